// Elements of the page. Texts of devices and logs are untrusted: they are set as text, never parsed.

export const $ = (id) => document.getElementById(id);

export function element(tag, className = "") {
  const made = document.createElement(tag);
  made.className = className;
  return made;
}

/** Set a text, where it differs: a selection, and what a screen reader reads, stay as they are. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Ask before something is done that people may not have meant. */
export function confirmThen({ question, meaning, yes }, act) {
  setText($("confirm-question"), question);
  setText($("confirm-meaning"), meaning);
  setText($("confirm-yes"), yes);
  $("confirm-yes").onclick = () => {
    $("confirm").close();
    act();
  };
  $("confirm").showModal();
}

/** Bring a list of elements in line with items: each has a key, and keeps its element, so the focus stays. */
export function keep(parent, items, keyOf, make, update) {
  const former = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, place) => {
    const key = String(keyOf(item));
    const child = former.get(key) ?? make(item);
    former.delete(key);
    child.dataset.key = key;
    update(child, item);
    if (parent.children[place] !== child) parent.insertBefore(child, parent.children[place] ?? null);
  });
  for (const child of former.values()) child.remove();
}

/** Fill a table's body. A row is its cells: a text, or {text, className, title}; the first one is its key and its header. */
export function fillTable(table, rows) {
  const heads = [...table.tHead.rows[0].cells];
  const make = () => {
    const row = withRole(element("tr"), "row");
    heads.forEach((head, place) => row.append(makeCell(head, place)));
    return row;
  };
  const update = (row, cells) => cells.forEach((cell, place) => setCell(row.cells[place], cell));
  keep(table.tBodies[0], rows, (cells) => textOf(cells[0]), make, update);
}

/** Say outright what the parts of a table are: one that is laid out as cards is none any more to a browser. */
export function nameParts(table) {
  withRole(table, "table");
  for (const part of [table.tHead, table.tBodies[0]]) withRole(part, "rowgroup");
  withRole(table.tHead.rows[0], "row");
  for (const head of table.tHead.rows[0].cells) withRole(head, "columnheader");
}

function makeCell(head, place) {
  const cell = withRole(element(place ? "td" : "th"), place ? "cell" : "rowheader");
  if (!place) cell.scope = "row";
  cell.dataset.label = head.textContent;
  cell.dataset.column = head.className;
  cell.append(element("span"));
  return cell;
}

function setCell(cell, value) {
  setText(cell.firstChild, textOf(value));
  cell.className = cell.dataset.column;
  cell.firstChild.className = value.className ?? "";
  if (value.title) cell.firstChild.title = value.title;
  cell.classList.toggle("empty", textOf(value) === "–");
}

function withRole(node, role) {
  node.setAttribute("role", role);
  return node;
}

const textOf = (cell) => (typeof cell === "string" ? cell : cell.text);
