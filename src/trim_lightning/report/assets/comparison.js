// A comparison of runs.
const KINDS = [["circle", "●"], ["square", "■"], ["triangle", "▲"], ["diamond", "◆"], ["star", "★"], ["cross", "✚"], ["wye", "Y"]];
const hue = (order) => `var(--hue${order % 7})`;

function sorting() {
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
      const rising = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [row.cells[column].dataset.value, row]);
      const numeric = rows.every(([value]) => value === "" || !Number.isNaN(Number(value)));
      rows.sort(([one], [two]) => {
        if (one === "" || two === "") return (one === "") - (two === ""); // nothing to sort by: last either way
        const order = numeric ? Number(one) - Number(two) : one.localeCompare(two, "en", { numeric: true });
        return rising ? order : -order;
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    }));
  }
}

function axisCharts() {
  const holder = $("axis-charts");
  if (!holder) return;
  const draw = () => {
    const measure = data.measures[$("axis-measure").selectedIndex];
    holder.replaceChildren(...data.axes.map((axis, order) => {
      const levels = axis.levels[measure].filter((level) => level.mean !== null);
      const figure = h("figure", { class: "axis" }, h("figcaption", {}, h("h3", {}, h("bdi", {}, visible(axis.name)))));
      if (!levels.length) { figure.append(h("p", {}, "No run has this measure.")); return figure; }
      const low = Math.min(...levels.map((level) => level.low)), high = Math.max(...levels.map((level) => level.high));
      const at = (value) => `${high > low ? 100 * (value - low) / (high - low) : 50}%`;
      figure.append(h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Effect of ${visible(axis.name)}` },
        h("table", { class: "plain bars" },
          h("caption", { class: "vh" }, `${visible(measure)} by ${visible(axis.name)}`),
          h("thead", {}, h("tr", {}, ["value", "runs", "mean", "", "least", "greatest"].map((text, place) => (text ? h("th", { scope: "col", class: place && text ? "n" : null }, text) : h("td", {}))))),
          h("tbody", {}, levels.map((level) => h("tr", {}, h("th", { scope: "row" }, h("bdi", {}, visible(level.text))), h("td", { class: "n" }, count(level.runs)), h("td", { class: "n" }, short(level.mean)),
            h("td", {}, h("span", { class: "range", "aria-hidden": "true" },
              h("span", { style: `left:${at(level.low)};right:calc(100% - ${at(level.high)})` }), h("i", { style: `left:${at(level.mean)}` }))),
            h("td", { class: "n" }, short(level.low)), h("td", { class: "n" }, short(level.high))))))));
      return figure;
    }));
  };
  $("axis-measure").addEventListener("change", draw);
  draw();
}
const short = (value) => (value === null ? "–" : Math.abs(value) >= 1000 ? count(Math.round(value)) : Number(value.toPrecision(4)).toString());

function tradeoff() {
  const methods = [...new Set(data.points.map((point) => point.method))];
  $("plot-legend").append(...methods.map((method, order) => h("span", {}, h("span", { "aria-hidden": "true", style: `color:${hue(order)}` }, KINDS[order % 7][1]), " ", h("bdi", {}, visible(method)))));
  const across = $("plot-x");
  const varies = (name) => new Set(data.points.map((point) => point.values[name])).size > 1;
  const budgets = data.measures.filter((name) => name.includes("in the coreset") || name.includes("seconds"));
  across.selectedIndex = data.measures.indexOf(budgets.find(varies) ?? budgets[0]);
  const render = chart("chart-plot", (width) => {
    const x = data.measures[across.selectedIndex], y = data.measures[$("plot-y").selectedIndex];
    const points = data.points.filter((point) => point.values[x] != null && point.values[y] != null)
      .map((point) => ({ ...point, x: point.values[x], y: point.values[y], low: point.bounds[y]?.[0], high: point.bounds[y]?.[1] }));
    const bounded = points.filter((point) => point.low != null && point.high != null);
    return Plot.plot({
      ...base(width, 340), marginLeft: 64, marginTop: 30, inset: 14,
      x: { label: visible(x), grid: true, nice: true, tickFormat: "~s" },
      y: { label: visible(y) + (data.lower.includes(y) ? " (lower is better)" : ""), grid: true, nice: true },
      marks: [
        Plot.link(bounded, { x1: "x", x2: "x", y1: "low", y2: "high", stroke: "var(--soft)", strokeOpacity: .5 }),
        ...methods.map((method, order) => Plot.dot(points.filter((point) => point.method === method), { x: "x", y: "y", r: 5.5, symbol: KINDS[order % 7][0], fill: hue(order), fillOpacity: .85, stroke: "var(--card)" })),
        Plot.tip(points, Plot.pointer({ x: "x", y: "y", title: (point) => visible(`${point.label} (${point.method})\n${x}: ${short(point.x)}\n${y}: ${short(point.y)}`), fill: "var(--card)", stroke: "var(--line)" })),
      ],
    });
  });
  for (const id of ["plot-x", "plot-y"]) $(id).addEventListener("change", render);
}

function sides() {
  const [first, second] = [$("side-a"), $("side-b")];
  if (!first) return;
  // begin with two that differ
  second.selectedIndex = Math.max(Math.min(1, second.options.length - 1), data.sides.findIndex((_, place) => data.exclusive[`0-${place}`]?.total));
  const fill = (side, one, two) => {
    const found = data.exclusive[`${one}-${two}`];
    $(`side-${side}-h`).textContent = found ? `${count(found.total)} only here${found.total > found.shown.length ? `, the best ${found.shown.length} of them` : ""}` : one === two ? "the same run" : "its records are not at hand";
    $(`side-${side}-list`).replaceChildren(...(found ? found.shown : []).map(([rank, key]) => {
      const record = data.records[key];
      return h("li", { class: "record" }, h("div", { class: "head" }, h("span", { class: "rank" }, `#${count(rank)}`), h("span", { class: "name" }, h("bdi", {}, visible(record.id)))), turns(record, ""));
    }));
  };
  const draw = () => { fill("a", first.value, second.value); fill("b", second.value, first.value); };
  for (const select of [first, second]) select.addEventListener("change", draw);
  draw();
}
