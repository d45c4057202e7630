"use strict";
(() => {
  const root = document.documentElement;
  const remembered = () => { try { return localStorage.getItem("kernelfuzz-theme"); } catch { return null; } };
  const remember = theme => { try { localStorage.setItem("kernelfuzz-theme", theme); } catch { /* a page on disk may not */ } };
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const toggle = document.getElementById("theme");
  const show = () => { toggle.textContent = dark() ? "Light" : "Dark"; };
  if (remembered()) root.dataset.theme = remembered();
  toggle.hidden = false;
  toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; remember(root.dataset.theme); show(); });
  show();

  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const text = document.getElementById(button.dataset.copy).textContent;
      try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(document.getElementById(button.dataset.copy)); button.textContent = "Selected"; }
    });
  }

  // A link to a failure opens it.
  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", open);
  open();

  // Heat maps: one stop for Tab, arrows go from cell to cell, Enter shows the counts of all pairs.
  const dialog = document.getElementById("pairs");
  const make = (tag, text, attributes = {}) => Object.assign(document.createElement(tag), { textContent: text }, attributes);
  const fill = (data, index) => {
    const [i, j, counts] = data.pairs[index];
    const first = data.dimensions[i], second = data.dimensions[j];
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    head.append(make("th", `${first.name} \\ ${second.name}`), ...second.values.map(value => make("th", value, { scope: "col" })));
    const body = table.createTBody();
    first.values.forEach((value, row) => {
      const line = body.insertRow();
      line.append(make("th", value, { scope: "row" }));
      counts[row].forEach(count => line.append(make("td", count ? String(count) : "not tried", { className: count ? "number" : "zero" })));
    });
    const box = make("div", "", { className: "wide" });
    box.append(table);
    dialog.querySelector("h3").textContent = `${first.name} with ${second.name}`;
    dialog.querySelector(".content").replaceChildren(box);
    dialog.showModal();
  };
  for (const map of document.querySelectorAll(".heat")) {
    const data = JSON.parse(document.getElementById(map.dataset.source).textContent);
    const rows = [...map.tBodies[0].rows].map(row => [...row.querySelectorAll("button")]);
    rows.flat().forEach((button, number) => { button.tabIndex = number ? -1 : 0; });
    const said = map.closest(".inside").querySelector(".said");
    said.hidden = false;
    said.textContent = "Point at a cell, or go to it with Tab and the arrows.";
    const say = event => { if (event.target.dataset.pair) said.textContent = event.target.title; };
    map.addEventListener("focusin", say);
    map.addEventListener("mouseover", say);
    map.addEventListener("click", event => { if (event.target.dataset.pair) fill(data, Number(event.target.dataset.pair)); });
    map.addEventListener("keydown", event => {
      const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
      const step = steps[event.key];
      const row = rows.findIndex(cells => cells.includes(event.target));
      if (!step || row < 0) return;
      event.preventDefault();
      const column = Number(event.target.dataset.column) + step[1];
      const next = (rows[row + step[0]] || []).find(cell => Number(cell.dataset.column) === column);
      if (!next) return;
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }
})();
