"use strict";
const at = id => document.getElementById(id), data = JSON.parse(at("data").textContent);
const figures = [...document.querySelectorAll("figure[data-run]")], [left, width] = data.axes;
const PARTS = "think|type|rubric|justify|solution|eval|answer|quote_A|quote_B|summary_A|summary_B";
const TAG = new RegExp(`^<(/?)(${PARTS})>$`), WORDS = new RegExp(`(</?(?:${PARTS})>|\\[\\[[AB]\\]\\]|\\s+)`);
const FILTERS = {
  "all": () => true,
  "right": pair => pair.right[now] === true,
  "wrong": pair => pair.right[now] === false,
  "wrong → right": pair => pair.right[against()] === false && pair.right[now] === true,
  "right → wrong": pair => pair.right[against()] === true && pair.right[now] === false,
  "no verdict": pair => pair.traces[now].some(trace => !trace.verdict),
  "flips with the order": pair => flips(pair.traces[now]),
};
let now = 0, chosen = null, filter = "all";  // the slider's evaluation, the pair that is shown

const tick = right => right === true ? "✓" : right === false ? "✗" : "·";
const look = right => right === true ? "right" : right === false ? "wrong" : "soft";
const flips = traces => traces.length === 2 && !!traces[0].verdict && traces[0].verdict === traces[1].verdict;
const against = () => at("against").value === "before" ? now - 1 : Number(at("against").value);

function add(parent, tag, text = "", look = "") {  // the only way a text enters the page: as text
  const node = document.createElement(tag);
  node.textContent = text; node.className = look; parent.append(node);
  return node;
}

// ---- one pair ----

function changes(words, old) {  // which words are new: those that the longest common subsequence leaves out
  let start = 0, end = 0;
  while (start < words.length && words[start] === old[start]) start++;
  while (end < Math.min(words.length, old.length) - start && words.at(-1 - end) === old.at(-1 - end)) end++;
  const a = words.slice(start, words.length - end), b = old.slice(start, old.length - end), found = new Set();
  if (a.length * b.length > 16e6) return found;  // two bytes each
  const wide = b.length + 1, best = new Uint16Array((a.length + 1) * wide);
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    best[i * wide + j] = a[i] === b[j] ? best[(i + 1) * wide + j + 1] + 1
      : Math.max(best[(i + 1) * wide + j], best[i * wide + j + 1]);
  for (let i = 0, j = 0; i < a.length;) {
    if (a[i] === b[j]) { i++; j++; }
    else if (j < b.length && best[i * wide + j + 1] >= best[(i + 1) * wide + j]) j++;
    else found.add(start + i++);
  }
  return found;
}

function invented(quote, response) {  // whether a piece of the quote (between dots) does not occur in the response
  const plain = text => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ").trim();
  return response !== undefined && !/characters more\]$/.test(response)
    && !quote.split(/\.\.\.|…/).every(piece => plain(response).includes(plain(piece)));
}

function chain(parent, trace, old, responses = {}) {  // no part opens within one of its name: no text can nest deeply
  const split = text => text.split(WORDS).filter(word => word.trim());
  const fresh = old ? changes(split(trace.text), split(old.text)) : new Set();
  let here = add(parent, "pre"), n = 0;
  for (const word of trace.text.split(WORDS)) {
    const [, slash, part] = word.match(TAG) || [], open = part && here.closest(".part." + part);
    if (part && !slash && !open) here = add(here, "span", "", "part " + part);
    if (part) add(here, "b", word);
    else if (/^\[\[[AB]\]\]$/.test(word)) add(here, "mark", word, word[2] === trace.verdict ? look(trace.right) : "");
    else if (fresh.has(n) && word.trim()) add(here, "ins", word);
    else here.append(word);
    n += word.trim() !== "";
    if (!slash || !open) continue;
    const quote = [...open.childNodes].slice(1, -1).map(node => node.textContent).join(""), letter = part.slice(6);
    if (part.startsWith("quote") && invented(quote, responses[letter])) {
      open.classList.add("invented");
      open.title = "Response " + letter + " does not say this.";
    }
    here = open.parentNode;
  }
}

function column(parent, pair, i) {
  const card = add(parent, "div", "", "card"), traces = pair.traces[i], before = pair.traces[against()] || [];
  if (i === now) card.classList.add("now");
  add(card, "h3", data.stages[i] + (traces.length ? "" : ": not judged"));
  const [, a, b] = pair.asked || [];
  for (const trace of traces) {
    const head = add(card, "h4", trace.order === "BA" ? "B shown as A: " : "");
    const said = trace.verdict ? "says " + trace.verdict : "no verdict";
    add(head, "span", said + " " + tick(trace.right), look(trace.right));
    if (trace.cut) add(head, "span", " cut off", "soft");
    chain(card, trace, i === now && before.find(other => other.order === trace.order),
      trace.order === "BA" ? {A: b, B: a} : {A: a, B: b});
  }
  const count = card.querySelectorAll(".invented").length;
  if (count) add(card, "p", `${count} quote${count === 1 ? " does" : "s do"} not occur in the response.`, "wrong note");
  if (flips(traces)) add(card, "p", "Both orders get the same letter: the place decides, not the text.", "wrong note");
}

function response(parent, pair, letter, text, votes) {
  const card = add(parent, "div", "", "card"), head = add(card, "h3", "Response " + letter);
  if (pair.better === letter) { card.classList.add("better"); add(head, "span", " better", "right"); }
  add(head, "span", `${votes} vote${votes === 1 ? "" : "s"}`, "soft votes");
  add(card, "pre", text);
}

function show(pair) {
  const section = at("pair");
  section.replaceChildren();
  if (!pair) return void add(section, "p", "No pair is like that at this evaluation.", "soft");
  add(section, "h3", pair.id + (pair.kind ? ", " + pair.kind : ""));
  const strip = add(section, "p", "", "strip");
  add(strip, "span", "History:", "soft");
  for (const [i, right] of pair.right.entries()) {
    const button = add(strip, "button", tick(right) + " ", look(right));
    add(button, "small", data.stages[i].replace(/^.* (?=step \d+$)/, ""));
    button.title = data.stages[i];
    if (i === now) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => move(i));
  }
  const votes = pair.votes[now] || [0, 0, 0], [question, ...texts] = pair.asked || [];
  if (pair.asked) add(add(section, "div", "", "card"), "pre", question);
  else add(section, "p", "The data file is not there any more; response " + pair.better + " is better.", "soft");
  const responses = add(section, "div", "", "columns"), columns = add(section, "div", "", "columns");
  for (const [i, text] of texts.entries()) response(responses, pair, "AB"[i], text, votes[i]);
  if (votes[2]) add(section, "p", `${votes[2]} of ${votes[0] + votes[1] + votes[2]} without a verdict`, "soft votes");
  section.append(columns);
  for (const i of new Set([against(), now])) if (data.stages[i] !== undefined) column(columns, pair, i);
}

// ---- which pairs ----

function list() {
  const nav = at("list"), scroll = nav.scrollTop, focused = nav.contains(document.activeElement);
  const kept = data.pairs.filter(pair => ["", "=" + pair.kind].includes(at("kind").value));
  const wanted = kept.filter(FILTERS[filter]);
  for (const button of at("filter").children) {
    button.textContent = `${button.value} (${kept.filter(FILTERS[button.value]).length})`;
    button.setAttribute("aria-pressed", button.value === filter);
  }
  at("count").textContent = wanted.length + " of " + data.total + " pairs";
  chosen = wanted.includes(chosen) ? chosen : wanted[0];
  nav.replaceChildren();
  for (const pair of wanted) {
    const button = add(nav, "button"), name = add(button, "span", pair.id), marks = add(button, "span");
    name.title = pair.id;
    for (const i of new Set([against(), now]))
      if (i in pair.right) add(marks, "span", tick(pair.right[i]), look(pair.right[i]));
    button.addEventListener("click", () => { chosen = pair; list(); });
    button.tabIndex = pair === chosen ? 0 : -1;
    if (pair !== chosen) continue;
    button.setAttribute("aria-current", "true");
    if (focused) button.focus({preventScroll: true});
  }
  const current = nav.querySelector("[aria-current]"), {offsetTop: top = 0, offsetHeight: tall = 0} = current || {};
  nav.scrollTop = Math.min(Math.max(scroll, top + tall - nav.clientHeight), top);  // not scrollIntoView: it moves the page
  show(chosen);
}

function keys(event) {
  const next = {ArrowUp: "previousSibling", ArrowDown: "nextSibling"}[event.key];
  const slide = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!next && !slide) return;
  event.preventDefault();
  if (slide) move(now + slide);
  else at("list").querySelector("[aria-current]")?.[next]?.click();
}

// ---- which evaluation ----

function move(i) {
  now = Math.max(0, Math.min(i, data.stages.length - 1));
  at("when").value = now;
  at("when").setAttribute("aria-valuetext", data.stages[now]);
  at("now").textContent = `${data.stages[now]}, accuracy ${data.accuracy[now]}`;
  const [run, step] = data.places[now];
  for (const figure of figures) {
    const {from, to} = figure.dataset, line = figure.querySelector("i");
    line.hidden = figure.dataset.run !== run || step === null || step < from || step > to;
    line.style.left = 100 * (left + width * (step - from) / (to - from)) + "%";
  }
  list();
}

function jump(event) {  // to the evaluation that is nearest to the place in the curve
  const {run, from, to} = event.currentTarget.parentNode.dataset, box = event.currentTarget.getBoundingClientRect();
  const step = Number(from) + ((event.clientX - box.left) / box.width - left) / width * (to - from);
  const far = ([other, at]) => other === run && at !== null ? Math.abs(at - step) : Infinity;
  const nearest = data.places.reduce((best, place, i) => far(place) < far(data.places[best]) ? i : best, 0);
  if (far(data.places[nearest]) < Infinity) move(nearest);
}

if (data.pairs.length) {
  for (const name of Object.keys(FILTERS)) {
    const button = add(at("filter"), "button");
    button.value = name;
    button.addEventListener("click", () => { filter = name; list(); });
  }
  add(at("kind"), "option", "all").value = "";
  const kinds = [...new Set(data.pairs.map(pair => pair.kind))].sort();
  for (const kind of kinds) add(at("kind"), "option", kind || "-").value = "=" + kind;
  add(at("against"), "option", "the one before").value = "before";
  for (const [i, name] of data.stages.entries()) add(at("against"), "option", name).value = i;
  at("against").value = data.last[0] < 0 ? "before" : data.last[0];
  for (const figure of figures) {
    const plot = figure.querySelector("div");
    add(plot, "i").hidden = true;
    plot.addEventListener("click", jump);
  }
  for (const id of ["kind", "against"]) at(id).addEventListener("change", list);
  at("list").addEventListener("keydown", keys);
  at("when").max = data.stages.length - 1;
  at("when").addEventListener("input", () => move(Number(at("when").value)));
  move(data.last[1]);
}

function scrolls() {  // a table that is wider than the page says that it scrolls
  for (const box of document.querySelectorAll(".wide")) box.classList.toggle("more", box.scrollWidth > box.clientWidth);
}
addEventListener("resize", scrolls);
scrolls();
