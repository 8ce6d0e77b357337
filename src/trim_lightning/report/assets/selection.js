// A selection's report and one explained record.
function scoreChart(width) {
  const { edges, counts } = data.scores;
  const bins = counts.left.map((left, place) => ({
    x1: edges[place], x2: edges[place + 1], left, picked: counts.picked[place],
  }));
  const tips = bins.filter((bin) => bin.left + bin.picked > 0).map((bin) => ({ ...bin, x: (bin.x1 + bin.x2) / 2, y: bin.left + bin.picked }));
  return Plot.plot({
    ...base(width),
    x: { label: "score", tickFormat: ".3~f" },
    y: { label: "records", grid: true, tickFormat: "~s" },
    marks: [
      Plot.rectY(bins, { x1: "x1", x2: "x2", y1: 0, y2: "left", fill: "var(--left)", insetLeft: .5, insetRight: .5 }),
      Plot.rectY(bins.filter((bin) => bin.picked), { x1: "x1", x2: "x2", y1: "left", y2: (bin) => bin.left + bin.picked, fill: "var(--picked)", insetLeft: .5, insetRight: .5 }),
      Plot.ruleY([0], { stroke: INK, strokeOpacity: .5 }),
      ...(data.cut === null ? [] : [
        Plot.ruleX([data.cut], { stroke: "var(--ink)", strokeWidth: 1.5, strokeDasharray: "4,3" }),
        Plot.text([data.cut], { x: (cut) => cut, frameAnchor: "top", dy: -16, text: (cut) => `cut ${cut.toFixed(4)}`, fill: "var(--ink)", fontWeight: 600 }),
      ]),
      Plot.tip(tips, Plot.pointerX({ x: "x", y: "y", title: (bin) => `${bin.x1.toPrecision(4)} to ${bin.x2.toPrecision(4)}\n${count(bin.picked)} picked\n${count(bin.left)} not picked`, fill: "var(--card)", stroke: "var(--line)" })),
    ],
  });
}

const POPULATIONS = [
  ["pool", "pool", "var(--pool)", 2, null],
  ["random", "random coreset", "var(--random)", 2, "5,4"],
  ["coreset", "coreset", "var(--picked)", 3, null],
];
function lengthChart(width) {
  const { edges, counts, overflow } = data.lengths;
  const lines = POPULATIONS.map(([name, label, stroke, strokeWidth, strokeDasharray]) => {
    const total = counts[name].reduce((sum, value) => sum + value, 0) || 1;
    const points = counts[name].map((value, place) => ({ x: edges[place], y: 100 * value / total, label }));
    points.push({ x: edges.at(-1), y: 0, label });
    return { points, options: { x: "x", y: "y", stroke, strokeWidth, strokeDasharray, curve: "step-after" } };
  });
  const tips = edges.slice(0, -1).map((edge, place) => ({
    x: (edge + edges[place + 1]) / 2,
    y: Math.max(...lines.map((line) => line.points[place].y)),
    title: [`${edge} to ${edges[place + 1]}${overflow && place === edges.length - 2 ? " and more" : ""} tokens`,
      ...lines.toReversed().map((line) => `${line.points[place].y.toFixed(1)} % of the ${line.points[place].label}`)].join("\n"),
  })).filter((tip) => tip.y > 0);
  return Plot.plot({
    ...base(width),
    x: { label: overflow ? "content tokens (the longest share the last bin)" : "content tokens" },
    y: { label: "% of the records", grid: true },
    marks: [
      Plot.ruleY([0], { stroke: INK, strokeOpacity: .5 }),
      ...lines.map((line) => Plot.lineY(line.points, line.options)),
      Plot.tip(tips, Plot.pointerX({ x: "x", y: "y", title: "title", fill: "var(--card)", stroke: "var(--line)" })),
    ],
  });
}

function targetView(target) {
  const describe = (places) => {
    const value = strongest(target[signal], places);
    if (value === null) return { kind: "off", value: null, fill: null };
    return {
      kind: "sal", value: Math.min(1, value / data.top),
      fill: () => [name(target.t[places[0]]), places.length > 1 ? ` ${places.length} tokens` : "",
        list(SIGNALS.map(([key, label]) => [label, places.map((at) => fixed(target[key][at])).join(", ")]))],
    };
  };
  return tokenView(target.t, `Target ${visible(target.id)}, token by token`, describe);
}
function targets() {
  const holder = $("target-views");
  if (!holder) return;
  data.targets.forEach((target, order) => holder.append(
    lazy([h("span", { class: "name" }, h("bdi", {}, visible(target.id))), h("span", { class: "facts" }, `${count(target.t.length + target.clipped)} tokens`)],
      order < 3, () => [targetView(target), clippedNote(target.t.length, target.clipped)])));
  $("signal").addEventListener("change", (event) => {
    signal = event.target.value;
    holder.querySelectorAll(".view").forEach((view, order) => {
      const target = data.targets[order];
      for (const token of view.querySelectorAll(".tok.sal")) {
        let at = Number(token.dataset.place);
        const places = [at];
        while (target.t[++at] === "") places.push(at);
        token.style.setProperty("--v", Math.min(1, strongest(target[signal], places) / data.top).toFixed(3));
      }
    });
  });
}

// tints run over the similarities that are shown, but for the lowest twentieth
let low = 0, high = 1;
function similarityRange(candidates) {
  const values = candidates.flatMap((item) => (item.view ? item.view.s.filter((value) => value !== null) : [])).sort((one, two) => one - two);
  if (!values.length) return;
  low = values[Math.floor(values.length / 20)];
  high = values.at(-1);
  if (high <= low) low = high - 1;
  const range = $("sim-range");
  if (range) range.textContent = `similarity ${fixed(low, 2)} to ${fixed(high, 2)}`;
}

function matchView(item) {
  const view = item.view;
  const describe = (places) => {
    const value = strongest(view.s, places);
    if (value === null) return { kind: "off", value: null, fill: null };
    const direct = places.every((at) => view.d[at] === 1);
    return {
      kind: direct ? "d" : "f", value: Math.min(1, Math.max(0, (value - low) / (high - low))),
      fill: () => [name(view.t[places[0]]), places.length > 1 ? ` ${places.length} tokens` : "",
        ...places.filter((at) => view.s[at] !== null).slice(0, 4).flatMap((at) => matched(view, at))],
    };
  };
  return tokenView(view.t, `Record ${visible(item.id)}, token by token`, describe);
}
const amount = (value) => (value > 0 ? "+" : "") + value.toPrecision(3);
function matched(view, at) {
  const token = view.m[at], direct = view.d[at] === 1;
  const best = data.occurrences[view.group ? `${view.group}/${token}` : String(token)];
  return [
    list([
      ["similarity", fixed(view.s[at])],
      ["match", direct ? "direct: its own class" : "fallback: the nearest class, with penalty"],
      view.a && view.a[at] !== null ? ["raw alignment", `${amount(view.a[at])}: how far a step for it goes for the targets`] : null,
      ["matched class", name(data.classes[token] ?? `#${token}`)],
      view.group ? ["group", h("bdi", {}, visible(view.group))] : null,
      best ? ["best target token", h("span", {}, "in ", h("bdi", {}, visible(best.target)), `, saliency ${fixed(best.saliency)}`)] : null,
    ]),
    best ? h("p", { class: "ctx", dir: "auto" }, visible(best.before), h("mark", {}, visible(best.text).replace(/\n/g, "↵\n")), visible(best.after)) : null,
  ].filter(Boolean);
}

function scoreFacts(item) {
  const parts = [`score ${fixed(item.score, 4)}`];
  for (const [part, value] of Object.entries(item.parts ?? {})) parts.push(`${part} ${fixed(value, 2)}`);
  if (item.mean !== null) parts.push(`mean ${fixed(item.mean)}`);
  if (item.max !== null) parts.push(`max ${fixed(item.max)}`);
  if (item.cov !== null) parts.push(`coverage ${fixed(item.cov, 2)}`);
  parts.push(`${count(item.n)} tokens`);
  return h("span", { class: "facts" }, parts.join(" · "));
}
const badge = (item) => h("span", { class: item.in ? "badge" : "badge out" }, item.in ? "picked" : "not picked");
function chips(item) {
  const names = Object.keys(item.f);
  return names.length ? h("ul", { class: "chips" }, names.map((key) => h("li", {}, h("bdi", {}, visible(`${key}: ${item.f[key]}`))))) : null;
}

const CLIP = 700;
function turn(role, text, query = "") {
  const made = h("p", { class: "text", dir: "auto" });
  const row = h("div", { class: "turn" }, h("span", { class: "role" }, role), made);
  if (text.length <= CLIP * 1.3) { made.append(show(text, query)); return row; }
  const hit = query ? text.toLowerCase().indexOf(query) : 0;
  const start = hit > CLIP / 2 ? hit - 150 : 0;
  made.append(start ? "… " : "", show(text.slice(start, start + CLIP), query), " …");
  row.append(h("button", { type: "button", class: "more", on: { click: (event) => {
    made.replaceChildren(show(text, query));
    event.target.remove();
    made.tabIndex = -1;
    made.focus();
  } } }, `Show all ${count(text.length)} characters`));
  return row;
}
const turns = (item, query) => item.turns.map(([role, text]) => turn(role, text, query));

function candidates() {
  const holder = $("candidate-views");
  if (!holder) return;
  const all = Object.values(data.candidates).flat();
  similarityRange(all);
  const fill = (which) => {
    closeTip();
    const items = data.candidates[which];
    holder.replaceChildren(...(items.length ? items.map((item, order) => lazy(
      [h("span", { class: "rank" }, item.rank === null ? "–" : `#${count(item.rank)}`), h("span", { class: "name" }, h("bdi", {}, visible(item.id))), badge(item), scoreFacts(item)],
      order < 3, () => [chips(item), ...(item.view ? [matchView(item), clippedNote(item.view.t.length, item.view.clipped)] : turns(item, ""))])) : [h("p", {}, "No record here.")]));
  };
  $("which").addEventListener("change", (event) => fill(event.target.value));
  fill("top");
}

// ---- the searchable list -------------------------------------------------------------------------------------

function records() {
  const holder = $("records");
  if (!holder) return;
  const size = 20;
  let query = "", now = 0, found = data.coreset;
  const lowered = new Array(data.coreset.length);
  const haystack = (place) => {
    const item = data.coreset[place];
    return (lowered[place] ??= [item.id, ...Object.values(item.f), ...item.turns.map((part) => part[1])].join("\n").toLowerCase());
  };
  const render = () => {
    const pages = Math.max(1, Math.ceil(found.length / size));
    now = Math.min(Math.max(now, 0), pages - 1);
    holder.replaceChildren(...found.slice(now * size, (now + 1) * size).map((item) => h("li", { class: "record" },
      h("div", { class: "head" }, h("span", { class: "rank" }, `#${count(item.rank)}`), h("span", { class: "name" }, h("bdi", {}, show(item.id, query))), scoreFacts(item)),
      chips(item), turns(item, query))));
    $("page").textContent = `page ${count(now + 1)} of ${count(pages)}`;
    $("first").disabled = $("previous").disabled = now === 0;
    $("next").disabled = $("last").disabled = now === pages - 1;
    $("found").textContent = query ? `${count(found.length)} of ${count(data.coreset.length)} records` : `${count(data.coreset.length)} records`;
  };
  const turnTo = (page) => { now = page; render(); $("coreset").scrollIntoView(); };
  $("first").addEventListener("click", () => turnTo(0));
  $("previous").addEventListener("click", () => turnTo(now - 1));
  $("next").addEventListener("click", () => turnTo(now + 1));
  $("last").addEventListener("click", () => turnTo(Infinity));
  let waiting = 0;
  $("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      query = event.target.value.toLowerCase();
      found = query ? data.coreset.filter((_, place) => haystack(place).includes(query)) : data.coreset;
      now = 0;
      render();
    }, 120);
  });
  render();
}

// ---- small things --------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = $(button.dataset.copy);
    try { await navigator.clipboard.writeText(source.textContent); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(source); button.textContent = "Selected"; }
  });
}
const field = $("mix-field");
if (field) field.addEventListener("change", () => {
  for (const mix of document.querySelectorAll("[data-mix]")) mix.hidden = mix.dataset.mix !== field.value;
});
const links = [...document.querySelectorAll(".toc a")];
if (links.length) {
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) {
      for (const link of links) link.toggleAttribute("aria-current", link.hash === `#${entry.target.id}`);
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  for (const link of links) { const part = document.querySelector(link.hash); if (part) seen.observe(part); }
}
