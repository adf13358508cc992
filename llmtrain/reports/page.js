"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const partners = JSON.parse(document.getElementById("partners").textContent);
  // Plotly would offer to upload a figure to its makers.
  const config = { showSendToCloud: false, plotlyServerURL: "", displaylogo: false, displayModeBar: "hover", responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

  // A figure's colours for a dark page; scales are turned round, so that the best stands out there as well.
  const painted = (value, key) => {
    if (typeof value === "string") return partners[value] || value;
    if (Array.isArray(value)) return key === "colorscale" ? value.map((stop) => stop.map((part) => painted(part, ""))) : value.map((one) => (one && typeof one === "object" && !Array.isArray(one) ? painted(one, "") : one));
    if (value && typeof value === "object") {
      const found = {};
      for (const name of Object.keys(value)) {
        const inner = value[name];
        found[name] = name === "reversescale" ? !inner : typeof inner === "string" && !/color$/.test(name) && name !== "colorscale" ? inner : painted(inner, name);
      }
      return found;
    }
    return value;
  };

  const draw = (div) => {
    const told = JSON.parse(document.getElementById(div.dataset.figure).textContent);
    const spec = dark.matches ? painted(told, "") : told;
    return Plotly.react(div, spec.data, spec.layout, config);
  };

  const divs = [...document.querySelectorAll(".plotly-graph-div")];
  const all = async () => {
    for (const div of divs) {
      await draw(div);
      await new Promise((next) => setTimeout(next));
    }
    document.documentElement.dataset.drawn = String(divs.length);
  };
  dark.addEventListener("change", all);
  all();

  const rank = (cell) => {
    const told = cell.dataset.value;
    return told === undefined ? cell.textContent.trim() : told === "" ? null : Number(told);
  };
  for (const head of document.querySelectorAll("th")) {
    head.querySelector("button").addEventListener("click", () => {
      const table = head.closest("table");
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [rank(row.cells[head.cellIndex]), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  }
})();
