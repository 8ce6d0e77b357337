"use strict";
(() => {
  const page = document.body.dataset.page;
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);

  // ---- elements; text only ever becomes text nodes -------------------------------------------------------------

  function h(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (key === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
      else made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return made;
  }

  const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200c\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\u{e0000}-\u{e0fff}\ud800-\udfff]/u;
  const UNSEEN_ALL = new RegExp(UNSEEN.source, "gu");

  function picture(character) {
    const code = character.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return code === 0x7f ? "␡" : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  }
  const visible = (text) => text.replace(UNSEEN_ALL, picture);

  // text with what cannot be seen written out, and matches marked
  function show(text, query = "") {
    const out = document.createDocumentFragment();
    const plain = (part) => {
      let from = 0;
      for (const found of part.matchAll(UNSEEN_ALL)) {
        out.append(part.slice(from, found.index), h("span", { class: "ctl" }, picture(found[0])));
        from = found.index + found[0].length;
      }
      out.append(part.slice(from));
    };
    if (!query) { plain(text); return out; }
    const lower = text.toLowerCase();
    let from = 0;
    if (lower.length === text.length) {
      for (let at = lower.indexOf(query); at >= 0; at = lower.indexOf(query, from)) {
        plain(text.slice(from, at));
        out.append(h("mark", {}, visible(text.slice(at, at + query.length))));
        from = at + query.length;
      }
    }
    plain(text.slice(from));
    return out;
  }

  const spaced = (text) => visible(text).replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  const fixed = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  const count = (value) => value.toLocaleString("en");

  // ---- colours -------------------------------------------------------------------------------------------------

  const themes = document.querySelectorAll("[data-theme][type=button]");
  function paint(theme) {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    for (const button of themes) button.setAttribute("aria-pressed", String(button.dataset.theme === theme));
  }
  for (const button of themes) button.addEventListener("click", () => paint(button.dataset.theme));

  // ---- charts --------------------------------------------------------------------------------------------------

  const INK = "var(--soft)";
  function chart(id, draw) {
    const holder = $(id);
    if (!holder) return () => {};
    const render = () => {
      const width = Math.max(280, Math.floor(holder.clientWidth || 600));
      const svg = draw(width);
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", holder.dataset.label || "chart");
      for (const part of svg.querySelectorAll("g")) part.removeAttribute("aria-label"); // names that say nothing
      for (const part of svg.children) part.setAttribute("aria-hidden", "true");
      holder.replaceChildren(svg);
    };
    render();
    let last = holder.clientWidth;
    new ResizeObserver(() => {
      if (Math.abs(holder.clientWidth - last) < 8) return;
      last = holder.clientWidth;
      render();
    }).observe(holder);
    return render;
  }
  const base = (width, height = 250) => ({ width, height, marginLeft: 52, marginBottom: 40, marginTop: 24, style: { fontSize: "12px", color: INK, background: "none" } });

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

  // ---- token views ---------------------------------------------------------------------------------------------

  const details = new WeakMap(); // token element -> what its tip says
  const tip = $("tip");
  let tipped = null;

  function place(element) {
    const box = element.getClientRects()[0] || element.getBoundingClientRect();
    tip.style.left = tip.style.top = "0px";
    const own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(12, box.left), innerWidth - own.width - 12);
    const below = box.bottom + 8, above = box.top - own.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${below + own.height > innerHeight && above > 0 ? above : below}px`;
  }
  function openTip(element) {
    const fill = details.get(element);
    if (!fill) return;
    closeTip();
    tip.replaceChildren(...fill());
    tip.hidden = false;
    place(element);
    element.setAttribute("aria-describedby", "tip");
    tipped = element;
  }
  function closeTip() {
    tip.hidden = true;
    if (tipped) tipped.removeAttribute("aria-describedby");
    tipped = null;
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") closeTip(); });
  document.addEventListener("scroll", () => { if (tipped && !tipped.matches(":focus")) closeTip(); }, { passive: true });

  function name(text) { return h("code", { class: "tokname" }, h("bdi", {}, spaced(text))); }
  function list(pairs) {
    return h("dl", {}, pairs.filter(Boolean).flatMap(([term, value]) => [h("dt", {}, term), h("dd", {}, value)]));
  }

  // texts: "" continues the character of the token before; describe(places) gives class, tint and tip of one piece
  function tokenView(texts, label, describe) {
    const view = h("div", { class: "tokens", role: "group", dir: "auto", "aria-label": label });
    const stops = [];
    let at = 0;
    while (at < texts.length) {
      let end = at + 1;
      while (end < texts.length && texts[end] === "") end += 1;
      const places = Array.from({ length: end - at }, (_, step) => at + step);
      const { kind, value, fill } = describe(places);
      const made = h("span", { class: `tok ${kind}` });
      if (value !== null) made.style.setProperty("--v", value.toFixed(3));
      // runs of tokens that do not count are kept on one line
      const breaks = kind !== "off" || (end < texts.length && describe([end]).kind !== "off");
      const parts = texts[at].split("\n");
      parts.forEach((part, line) => {
        made.append(show(part));
        if (line < parts.length - 1) made.append(h("span", { class: "nl", "aria-hidden": "true" }, "↵"), breaks ? "\n" : "");
      });
      if (fill) {
        details.set(made, fill);
        made.tabIndex = stops.length ? -1 : 0;
        stops.push(made);
      }
      made.dataset.place = at;
      view.append(made);
      at = end;
    }
    const go = (target) => {
      if (!target) return;
      for (const stop of stops) stop.tabIndex = -1;
      target.tabIndex = 0;
      target.focus();
    };
    view.addEventListener("mouseover", (event) => openTip(event.target.closest(".tok")));
    view.addEventListener("mouseleave", () => { if (!view.contains(document.activeElement)) closeTip(); });
    view.addEventListener("focusin", (event) => openTip(event.target.closest(".tok")));
    view.addEventListener("focusout", closeTip);
    view.addEventListener("click", (event) => { const token = event.target.closest(".tok"); if (stops.includes(token)) go(token); });
    view.addEventListener("keydown", (event) => {
      const now = stops.indexOf(document.activeElement);
      const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: stops.length - 1 }[event.key];
      if (now < 0 || to === undefined) return;
      event.preventDefault();
      go(stops[Math.min(Math.max(to, 0), stops.length - 1)]);
    });
    return view;
  }
  const clippedNote = (shown, clipped) => {
    const notes = [];
    if (clipped) notes.push(`${count(clipped)} more tokens are not shown; trim-explain shows them.`);
    if (data.kept && shown + clipped >= data.kept) notes.push(`It fills the ${count(data.kept)} tokens that are kept of a record: what may follow was cut.`);
    return notes.length ? h("p", { class: "sub" }, notes.join(" ")) : null;
  };

  // a <details> whose content is made when it is first opened
  function lazy(summary, open, fill) {
    const made = h("details", { class: "view" }, h("summary", {}, summary));
    const once = () => { if (made.open && made.childElementCount === 1) made.append(...fill().filter(Boolean)); };
    made.addEventListener("toggle", once);
    if (open) { made.open = true; once(); }
    return made;
  }

  let signal = "s";
  const SIGNALS = [["s", "combined"], ["r", "row"], ["c", "column"]];
  const strongest = (values, places) => places.reduce((best, at) => (values[at] !== null && (best === null || values[at] > best) ? values[at] : best), null);

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
  function matched(view, at) {
    const token = view.m[at], direct = view.d[at] === 1;
    const best = data.occurrences[view.group ? `${view.group}/${token}` : String(token)];
    return [
      list([
        ["similarity", fixed(view.s[at])],
        ["match", direct ? "direct: its own class" : "fallback: the nearest class, with penalty"],
        ["matched class", name(data.classes[token] ?? `#${token}`)],
        view.group ? ["group", h("bdi", {}, visible(view.group))] : null,
        best ? ["best target token", h("span", {}, "in ", h("bdi", {}, visible(best.target)), `, saliency ${fixed(best.saliency)}`)] : null,
      ]),
      best ? h("p", { class: "ctx", dir: "auto" }, visible(best.before), h("mark", {}, visible(best.text).replace(/\n/g, "↵\n")), visible(best.after)) : null,
    ].filter(Boolean);
  }

  function scoreFacts(item) {
    const parts = [`score ${fixed(item.score, 4)}`];
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

  // ---- comparison ----------------------------------------------------------------------------------------------

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

  // ---- pages ---------------------------------------------------------------------------------------------------

  if (page === "report") {
    if (data.scores) chart("chart-scores", scoreChart);
    if (data.lengths) chart("chart-lengths", lengthChart);
    targets();
    candidates();
    records();
  }
  if (page === "explain") {
    const [item] = data.candidates.only;
    similarityRange([item]);
    $("only-view").append(...(item.view ? [matchView(item)] : turns(item, "")));
    targets();
  }
  if (page === "compare") {
    sorting();
    axisCharts();
    tradeoff();
    sides();
  }
  document.documentElement.dataset.ready = "true";
})();
