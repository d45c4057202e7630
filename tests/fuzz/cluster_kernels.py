"""Kernels of `bgmv` for nights on a cluster, run in workers as `cluster_kernels:<function>`.

Each notes its launches in the file of its name in the folder $CLUSTER_KERNELS: the node, which has its number in
$CLUSTER_NODE, and the case. Other files there tell them what to do.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import engine_kernels

FOLDER = Path(os.environ["CLUSTER_KERNELS"])


def _note(name, case):
    with (FOLDER / name).open("a") as launches:
        launches.write(f"{os.environ['CLUSTER_NODE']} {case}\n")
    time.sleep(0.01)


def wrong_and_waits(inputs, outputs):
    """Wrong above rank 8. The launch that finds the file `wait`, and takes it away, waits for ever."""
    _note("wrong_and_waits", inputs.case)
    with suppress(FileNotFoundError):
        (FOLDER / "wait").rename(FOLDER / "waits")
        (FOLDER / "waiting").write_text(f"{os.environ['CLUSTER_NODE']} {inputs.case}\n")
        time.sleep(3600)
    engine_kernels.wrong_above_rank_8(inputs, outputs)


def kills_its_lane(inputs, outputs):
    """Right but for the first case above rank 8, which takes the lane along each time."""
    _note("kills_its_lane", inputs.case)
    mark = FOLDER / "deadly"
    if engine_kernels.rank(inputs.case) > 8:
        with suppress(FileExistsError), mark.open("x") as file:
            file.write(f"{inputs.case}")
        if mark.read_text() == f"{inputs.case}":
            forkserver = os.getppid()
            lane = Path(f"/proc/{forkserver}/stat").read_text().rpartition(")")[2].split()[1]
            os.kill(int(lane), signal.SIGKILL)
            time.sleep(3600)
    engine_kernels.right(inputs, outputs)


def wrong_for_a_while(inputs, outputs):
    """Right; wrong above rank 8 as long as there is the file `wrong`."""
    _note("wrong_for_a_while", inputs.case)
    if (FOLDER / "wrong").exists() and engine_kernels.rank(inputs.case) > 8:
        (FOLDER / "was_wrong").touch()
        return engine_kernels.wrong_above_rank_8(inputs, outputs)
    return engine_kernels.right(inputs, outputs)
