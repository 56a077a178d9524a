// Sorting of tables by a click on a column's head, and marks of one row standing out while its name is pointed at;
// pages are complete without either.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.order ?? row.cells[column].textContent.trim();
      const compare = head.dataset.kind === "number"
        ? (a, b) => Number(a) - Number(b)
        : (a, b) => a.localeCompare(b);
      const missing = (row) => value(row) === "" || value(row) === "–";
      const rows = [...body.rows].sort((a, b) =>
        missing(a) - missing(b) || (missing(a) ? 0 : compare(value(a), value(b)) * (down ? -1 : 1)));
      body.append(...rows);
    });
  });
}

const marks = document.querySelectorAll("svg [data-row]");
const only = (row) => marks.forEach((mark) => mark.classList.toggle("off", row !== null && mark.dataset.row !== row));
for (const name of document.querySelectorAll("[data-of]")) {
  name.addEventListener("pointerenter", () => only(name.dataset.of));
  name.addEventListener("pointerleave", () => only(null));
}
