"use strict";
// Without this script the page shows a default round and the tables as they are.
for (const gallery of document.querySelectorAll(".gallery")) {
  const panels = [...gallery.querySelectorAll(".panel")];
  const control = gallery.querySelector(".slider");
  const range = gallery.querySelector("input");
  if (panels.length < 2) continue;
  const show = () => {
    panels.forEach((panel, n) => { panel.hidden = n !== Number(range.value); });
    const text = "round " + panels[Number(range.value)].dataset.round;
    range.setAttribute("aria-valuetext", text);
    gallery.querySelector("output").textContent = text;
  };
  range.addEventListener("input", show);
  control.hidden = false;
  show();
}
const known = (cell) => cell.dataset.v !== undefined ? cell.dataset.v !== "" : cell.textContent.trim() !== "";
const compare = (a, b) => a.dataset.v !== undefined
  ? Number(a.dataset.v) - Number(b.dataset.v) || 0 // two infinite ones are equal
  : a.textContent.trim().localeCompare(b.textContent.trim(), undefined, { numeric: true });
for (const head of document.querySelectorAll("table.sortable thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const place = head.cellIndex;
    const first = head.classList.contains("num") ? "descending" : "ascending";
    const now = head.getAttribute("aria-sort");
    const order = !now ? first : now === "ascending" ? "descending" : "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows];
    rows.sort((r, s) => {
      const a = r.cells[place], b = s.cells[place];
      if (known(a) !== known(b)) return known(a) ? -1 : 1; // what is not known comes last
      return known(a) ? sign * compare(a, b) : 0;
    });
    body.append(...rows);
  });
}
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details:not([open])")) {
    one.open = true;
    one.dataset.closed = "";
  }
});
addEventListener("afterprint", () => {
  for (const one of document.querySelectorAll("details[data-closed]")) one.open = false;
});
