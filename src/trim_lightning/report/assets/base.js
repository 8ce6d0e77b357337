// Shared by all pages: elements, colours, charts, token views. The parts are joined into one function (page.py).
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
