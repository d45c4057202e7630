"""kernelfuzz.toml: what a night is to run."""

import pytest

from kernelfuzz.fuzz.nightly.config import Config, cluster_jobs, local_jobs, read_config
from kernelfuzz.strategies.errors import KernelfuzzError


@pytest.fixture
def config(tmp_path):
    def read(text):
        path = tmp_path / "kernelfuzz.toml"
        path.write_text(text)
        return read_config(path)

    return read


def test_an_empty_file_asks_for_the_defaults(config):
    assert config("") == Config()


def test_every_key_is_read(config, tmp_path):
    (tmp_path / "known.toml").write_text('[[failure]]\nfingerprint = "a"\nreason = "b"\n')
    read = config(
        'targets = ["bgmv", "bgmv"]\nkernels = ["example"]\ndevices = ["cpu"]\nregressions = false\n'
        'known-failures = "known.toml"\nexamples = "redis://me:secret@host/0"\nworkers = 2\n'
    )
    assert (read.targets, read.kernels, read.devices) == (("bgmv",), ("example",), ("cpu",))
    assert (read.regressions, read.workers, [each.fingerprint for each in read.known]) == (False, 2, ["a"])
    assert "secret" not in str(read.to_json())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("target = []", "unknown key 'target': expected targets, kernels"),
        ('targets = "bgmv"', "targets is 'bgmv': expected a list of texts"),
        ("targets = [1]", "expected a list of texts"),
        ('targets = ["nothing"]', "unknown target 'nothing': expected one of"),
        ('devices = ["gpu"]', "unknown device 'gpu'"),
        ('devices = ["cuda:1"]', "'cuda:1': name a kind"),
        ("regressions = 1", "regressions is 1: expected true or false"),
        ("workers = 0", "workers is 0: expected a number of at least 1"),
        ("workers = true", "workers is True"),
        ('examples = ""', "examples is '': expected text"),
        ('known-failures = "gone.toml"', "gone.toml: No such file"),
        ("targets = [", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(config, text, said):
    with pytest.raises(KernelfuzzError) as refusal:
        config(text)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_cannot_run_here_is_skipped_and_what_is_unknown_is_refused():
    jobs, skipped = local_jobs(Config(targets=("bgmv",), kernels=("example",), devices=("cpu", "xpu")))
    assert [str(job) for job in jobs] == ["bgmv on example (cpu)"]
    assert [each.device for each in skipped] == ["xpu"]
    with pytest.raises(KernelfuzzError, match="no kernel 'nothing'"):
        local_jobs(Config(kernels=("nothing",)))
    with pytest.raises(KernelfuzzError, match="nothing can run here"):
        local_jobs(Config(targets=("bgmv",), kernels=("example",), devices=("xpu",)))


def test_a_cluster_runs_each_kernel_on_the_best_kind_that_it_has():
    asked = Config(targets=("bgmv",), kernels=("example",))
    assert [str(job) for job in cluster_jobs(asked, ["cpu", "cuda"])] == ["bgmv on example (cuda)"]
    both = Config(targets=("bgmv",), kernels=("example",), devices=("cpu", "cuda"))
    assert {str(job) for job in cluster_jobs(both, ["cpu", "cuda"])} == {
        "bgmv on example (cpu)",
        "bgmv on example (cuda)",
    }
    with pytest.raises(KernelfuzzError, match="which has no lanes"):
        cluster_jobs(asked, [])
