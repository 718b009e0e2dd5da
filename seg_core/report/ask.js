// Sends the SQL to the server of this page, and shows its answer as a table, or the line that says what is wrong.
{
  const find = (name) => document.getElementById(`ask-${name}`);
  const [sql, run, failure, answer, note] = ["sql", "run", "error", "answer", "note"].map(find);

  const cell = (tag, text, isText) => {
    const found = document.createElement(tag);
    found.textContent = text;
    if (isText) {
      found.className = "text";
      found.title = text;
    }
    return found;
  };

  // Numbers have as many digits as can be read.
  const textOf = (value) => {
    if (value === null) return "null";
    if (typeof value !== "number") return String(value);
    return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(7)));
  };

  const rowOf = (values, isText) => {
    const row = document.createElement("tr");
    values.forEach((value, at) => {
      const found = cell("td", textOf(value), isText[at]);
      if (value === null) found.classList.add("null");
      row.append(found);
    });
    return row;
  };

  const showTable = ({ columns, rows, note: leftOut }) => {
    const isText = columns.map((_, at) => rows.some((row) => row[at] !== null && typeof row[at] !== "number"));
    const head = document.createElement("tr");
    head.append(...columns.map((name, at) => cell("th", name, isText[at])));
    answer.querySelector("thead").replaceChildren(head);
    answer.querySelector("tbody").replaceChildren(...rows.map((row) => rowOf(row, isText)));
    answer.scrollTo(0, 0);
    note.textContent = leftOut || `${rows.length.toLocaleString("en")} ${rows.length === 1 ? "row" : "rows"}`;
  };

  const show = (found) => {
    failure.textContent = found.error ?? "";
    failure.hidden = found.error === undefined;
    answer.hidden = !failure.hidden;
    note.textContent = "";
    if (failure.hidden) showTable(found);
  };

  const ask = async () => {
    const sent = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ sql: sql.value }) };
    try {
      const response = await fetch("query", sent);
      return response.ok ? await response.json() : { error: await response.text() };
    } catch {
      return { error: "seg view does not answer: has it ended? Start it again, and open the address that it prints." };
    }
  };

  document.getElementById("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    run.disabled = true;
    show(await ask());
    run.disabled = false;
  });
  sql.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) sql.form.requestSubmit();
  });
}
