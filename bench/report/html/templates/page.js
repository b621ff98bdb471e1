"use strict";
// Sorting: a button in each heading; the page is whole without it.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const original = [...table.tBodies];
  const box = table.closest("section").querySelector(".controls");
  const together = box.querySelector("input");
  const status = table.closest("section").querySelector("[role=status]");
  let column = -1;
  let falling = false;

  const value = (body, index) => {
    const cell = body.rows[0].cells[index];
    if (index === 0) return cell.firstChild.textContent + cell.textContent;
    const number = parseFloat(cell.textContent.replaceAll(",", ""));
    return Number.isNaN(number) ? null : number;
  };
  const compare = (a, b) => {
    const [x, y] = [value(a, column), value(b, column)];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === "string" ? x.localeCompare(y) : x - y;
    return falling ? -order : order;
  };

  const show = () => {
    const groups = [];
    for (const body of original) {
      if (body.className === "s") groups.push([body]);
      else groups[groups.length - 1].push(body);
    }
    const apart = column >= 0 && !together.checked;
    table.classList.toggle("flat", apart);
    const sorted = (bodies) => (column < 0 ? bodies : [...bodies].sort(compare));
    const bodies = apart
      ? [...groups.map((g) => g[0]), ...sorted(groups.flatMap((g) => g.slice(1)))]
      : groups.flatMap((g) => [g[0], ...sorted(g.slice(1))]);
    table.append(...bodies);
    heads.forEach((head, index) => {
      const state = index !== column ? "none" : falling ? "descending" : "ascending";
      head.setAttribute("aria-sort", state);
    });
    const name = column < 0 ? "" : heads[column].querySelector("button").textContent;
    status.textContent = column < 0 ? "In the order of the report" :
      `Sorted by ${name}, ${falling ? "descending" : "ascending"}`;
  };

  heads.forEach((head, index) => {
    const label = head.querySelector(".label");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "label";
    button.append(...label.childNodes);
    label.replaceWith(button);
    button.addEventListener("click", () => {
      const first = "falling" in head.dataset;
      if (column !== index) [column, falling] = [index, first];
      else if (falling === first) falling = !first;
      else column = -1;
      show();
    });
  });
  together.addEventListener("change", show);
  box.hidden = false;
}
