// Tables that sort by a click on their heads, filter, and become cards where they do not fit. Without it the page reads
// the same: tables then scroll.
(() => {
  const text = (cell) => (cell ? cell.textContent.trim() : "");
  const value = (cell) => {
    const words = text(cell).replace(/[\u202f\s]/g, "").replace("\u2212", "-").match(/^[<+]?-?\d+(\.\d+)?/);
    return words ? parseFloat(words[0].replace(/[<+]/, "")) : NaN;
  };

  const name = (head) =>
    [...(head.querySelector("button") || head).childNodes].map(text).filter(Boolean).slice(0, 2).join(", ");

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    if (!body || body.querySelector("tr.head") || body.rows.length < 2) continue;
    for (const [index, head] of [...table.tHead.rows[0].cells].entries()) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") === "descending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [value(a.cells[index]), value(b.cells[index])];
          if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
          const order = isNaN(x) ? text(a.cells[index]).localeCompare(text(b.cells[index])) : x - y;
          return up ? order : -order;
        });
        body.append(...rows);
      });
    }
  }

  for (const table of document.querySelectorAll("table.filtered")) {
    if (table.tBodies[0].rows.length < 8) continue;
    const input = document.createElement("input");
    input.type = "search";
    input.placeholder = "filter";
    input.setAttribute("aria-label", "Filter the rows of this table");
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
    table.parentNode.before(input);
  }

  // A table that is wider than its place is shown as cards, each cell with its column's name.
  const boxes = [...document.querySelectorAll(".wide")];
  for (const box of boxes) {
    const table = box.querySelector("table");
    const heads = table.tHead ? [...table.tHead.rows[0].cells].map(name) : [];
    table.setAttribute("role", "table");
    for (const row of table.rows) {
      row.setAttribute("role", "row");
      for (const [index, cell] of [...row.cells].entries()) {
        const head = cell.tagName === "TH";
        cell.setAttribute("role", head ? (row.parentNode === table.tHead ? "columnheader" : "rowheader") : "cell");
        if (!head && heads[index]) cell.dataset.label = heads[index];
      }
    }
  }
  const fit = () => {
    for (const box of boxes) {
      const table = box.querySelector("table");
      table.classList.remove("cards");
      if (box.clientWidth && box.scrollWidth > box.clientWidth + 1) table.classList.add("cards");
    }
  };
  fit();
  addEventListener("resize", fit);
  addEventListener("toggle", fit, true);
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details.notes")) details.open = true;
  });
})();
