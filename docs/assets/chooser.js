// Hides the rows of the table of methods that do not fit the choices above it. Without JavaScript the whole table is shown.
const form = document.querySelector("form.chooser");
if (form) {
  const rows = [...document.querySelectorAll("#methods tbody tr")];
  const fits = (row, name, wanted) => {
    const value = row.dataset[name] ?? "";
    if (!wanted) return true;
    if (name === "tasks") return value.split(" ").includes(wanted);
    if (name === "training" || name === "prediction") return value !== "" && Number(value) <= Number(wanted);
    return value === wanted;
  };
  const choose = () => {
    const wanted = [...new FormData(form)];
    for (const row of rows) row.hidden = !wanted.every(([name, value]) => fits(row, name, value));
    const shown = rows.filter((row) => !row.hidden).length;
    form.querySelector("output").textContent = `${shown} of ${rows.length} methods`;
  };
  form.addEventListener("change", choose);
  form.hidden = false;
  choose();
}
