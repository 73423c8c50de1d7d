"use strict";
// Sorting and filtering of the class tables, hiding of runs, and what a pointer shows over a chart.
const number = (text) => parseFloat(text.replace("−", "-").replace(/[,+]/g, ""));

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const numeric = head.classList.contains("n"), before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : numeric;
    const keyed = [...body.rows].map((row) => {
      const text = row.cells[column].textContent;
      return [numeric ? number(text) : text, row];
    });
    const order = numeric ? (a, b) => a - b : new Intl.Collator(undefined, { numeric: true }).compare;
    keyed.sort(([a], [b]) => {
      if (numeric && (isNaN(a) || isNaN(b))) return isNaN(a) - isNaN(b); // what was not measured stays last
      return down ? order(b, a) : order(a, b);
    });
    body.append(...keyed.map(([, row]) => row));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }));
}

for (const field of document.querySelectorAll("input[data-filter]")) {
  const body = document.getElementById(field.dataset.filter).tBodies[0];
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
}

for (const box of document.querySelectorAll("input[data-run]")) {
  box.addEventListener("change", () => {
    for (const part of document.querySelectorAll(`.line.run${box.dataset.run}, .legend .run${box.dataset.run}`))
      part.style.display = box.checked ? "" : "none";
  });
}

const tip = document.getElementById("tip");
function show(event, text) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 4))}px`;
  tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
}

// The place of the pointer in the units of a drawing.
function place(svg, event) {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return [point.x, point.y];
}

for (const svg of document.querySelectorAll("svg.chart")) {
  let parts = null;
  svg.addEventListener("pointerleave", (event) => show(event, ""));
  svg.addEventListener("pointermove", (event) => {
    parts ??= [...svg.querySelectorAll(".line")].map((line) => ({
      line, values: JSON.parse(line.dataset.points ?? line.dataset.values), named: "points" in line.dataset,
      dots: "points" in line.dataset
        ? [...line.querySelectorAll("circle")].map((dot) => [dot.cx.baseVal.value, dot.cy.baseVal.value])
        : (line.querySelector("path").getAttribute("d").match(/[\d.-]+ [\d.-]+/g) ?? []).map((pair) => pair.split(" ").map(Number)),
    }));
    const [x, y] = place(svg, event), seen = parts.filter(({ line }) => line.style.display !== "none");
    const points = seen.some(({ named }) => named);
    let best = null, least = points ? 12 : Infinity;
    for (const part of seen) if (part.named === points) part.dots.forEach((dot, at) => {
      const away = points ? Math.hypot(dot[0] - x, dot[1] - y) : Math.abs(dot[0] - x);
      if (away < least) [least, best] = [away, { part, at }];
    });
    if (!best) return show(event, "");
    const values = best.part.values[best.at];
    if (points) {
      const names = svg.dataset.names && JSON.parse(document.getElementById(svg.dataset.names).textContent);
      const name = names ? `${names[values[0]]}\n` : "";
      return show(event, `${name}${svg.dataset.x}: ${values[1]}\n${svg.dataset.y}: ${values[2]}\n${best.part.line.dataset.label}`);
    }
    const told = seen.map((part) => [part.line.dataset.label, part.values.find((pair) => pair[0] === values[0])]);
    const lines = told.filter(([, pair]) => pair).map(([label, pair]) => `${label}: ${pair[1]}`);
    show(event, `${svg.dataset.x} ${values[0]}\n${lines.join("\n")}`);
  });
}

for (const svg of document.querySelectorAll("svg.heat")) {
  let cells = null, rows = null;
  const [left, top_, side] = svg.dataset.side.split(" ").map(Number);
  svg.addEventListener("pointerleave", (event) => show(event, ""));
  svg.addEventListener("pointermove", (event) => {
    cells ??= JSON.parse(svg.dataset.cells);
    rows ??= JSON.parse(svg.dataset.rows);
    const [x, y] = place(svg, event), row = Math.floor((y - top_) / side * rows.length), column = Math.floor((x - left) / side * rows.length);
    const value = row >= 0 && column >= 0 && row < rows.length && column < rows.length ? cells[row * rows.length + column] : null;
    const put = { row: rows[row], column: rows[column], value };
    show(event, value === null ? "" : svg.dataset.sentence.replace(/\{(\w+)\}/g, (_, name) => put[name]));
  });
}
