"use strict";
const at = id => document.getElementById(id), data = JSON.parse(at("data").textContent);
const figures = [], [left, width] = data.axes;
const STAGE = {sft: ": distillation", grpo: ": reinforcement learning"};
const PARTS = "think|type|rubric|justify|solution|eval|answer|quote_A|quote_B|summary_A|summary_B";
const TAG = new RegExp(`^<(/?)(${PARTS})>$`), WORDS = new RegExp(`(</?(?:${PARTS})>|\\[\\[[AB]\\]\\]|\\s+)`);
const FILTERS = {  // what each keeps, and how the button explains it
  "all": [() => true, "every pair on this page"],
  "right": [pair => mark(pair, now) === "✓", "right in every order that was judged"],
  "wrong": [pair => "✗?".includes(mark(pair, now)), "right in no order"],
  "became right": [pair => changed(pair, against(), now), "✓ now, and not at the evaluation that it is compared with"],
  "no longer right": [pair => changed(pair, now, against()), "not ✓ now, but at the evaluation that it is compared with"],
  "no verdict": [pair => pair.traces[now].some(trace => !trace.verdict), "no verdict in at least one order"],
  "flips with the order": [pair => flips(pair.traces[now]), "the same letter in both orders, so another response"],
  "invented quotes": [pair => pair.traces[now].some(trace => count(trace, pair)), "a quote that the response does not hold"],
};
let now = 0, chosen = null, filter = "all";  // the slider's evaluation, the pair that is shown

const LOOK = {"✓": "right", "✗": "wrong", "½": "half"};
const several = (pair, i) => sum(pair.votes[i]) > pair.traces[i].length, sum = votes => (votes || []).reduce((a, b) => a + b, 0);
const changed = (pair, i, j) => !["✓", "·"].includes(mark(pair, i)) && mark(pair, j) === "✓";
const named = (trace, letter) => trace.order === "BA" && letter ? "AB"["BA".indexOf(letter)] : letter;
const quotes = trace => trace.text.includes("<quote_");
const flips = traces => traces.length === 2 && !!traces[0].verdict && traces[0].verdict === traces[1].verdict;
const against = () => at("against").value === "before" ? now - 1 : Number(at("against").value);

function mark(pair, i) {  // of all orders; of several votes, what the majority says
  const traces = pair.traces[i] || [], right = traces.filter(trace => trace.right).length;
  if (!traces.length) return "·";
  if (several(pair, i)) {
    const [a, b] = pair.votes[i];
    return a + b === 0 ? "?" : (pair.better === "A" ? a > b : b > a) ? "✓" : "✗";
  }
  return right === traces.length ? "✓" : right ? "½" : traces.some(trace => trace.verdict) ? "✗" : "?";
}

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

const whole = response => response !== undefined && !/characters more\]$/.test(response);

function invented(quote, response) {  // whether a piece of the quote (between dots) does not occur in the response
  const plain = text => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ").trim();
  return whole(response) && !quote.split(/\.\.\.|…/).every(piece => plain(response).includes(plain(piece)));
}

function chain(parent, trace, old, responses = {}) {  // no part opens within one of its name: no text can nest deeply
  const split = text => text.split(WORDS).filter(word => word.trim());
  const fresh = old ? changes(split(trace.text), split(old.text)) : new Set();
  let here = add(parent, "pre"), n = 0;
  for (const word of trace.text.split(WORDS)) {
    const [, slash, part] = word.match(TAG) || [], open = part && here.closest(".part." + part);
    if (part && !slash && !open) here = add(here, "span", "", "part " + part);
    if (part) add(here, "b", word);
    else if (/^\[\[[AB]\]\]$/.test(word)) add(here, "mark", word, word[2] !== trace.verdict ? "" : trace.right ? "right" : "wrong");
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

function shown(trace, pair) {  // the responses by the letters under which the judge saw them
  const [, a, b] = pair.asked || [];
  return trace.order === "BA" ? {A: b, B: a} : {A: a, B: b};
}

function count(trace, pair) {  // invented quotes in a trace, found once
  if (trace.invented !== undefined || !quotes(trace)) return trace.invented || 0;
  const apart = document.createElement("div");
  chain(apart, trace, null, shown(trace, pair));
  return trace.invented = apart.querySelectorAll(".invented").length;
}

function column(parent, pair, i) {
  const card = add(parent, "div", "", "card"), traces = pair.traces[i], before = pair.traces[against()] || [];
  if (i === now) card.classList.add("now");
  add(card, "h3", data.stages[i] + (traces.length ? "" : ": not judged"));
  for (const trace of traces) {
    const votes = several(pair, i) ? `first of ${sum(pair.votes[i]) / traces.length} votes: ` : "";
    const head = add(card, "h4", (trace.order === "BA" ? "B shown as A: " : "") + votes);
    const letter = trace.order === "BA" ? ` (= response ${named(trace, trace.verdict)})` : "";
    const said = trace.verdict ? "says " + trace.verdict + letter + (trace.right ? " ✓" : " ✗") : "no verdict";
    add(head, "span", said, trace.right ? "right" : "wrong");
    if (trace.cut) add(head, "span", " cut off", "soft");
    chain(card, trace, i === now && before.find(other => other.order === trace.order), shown(trace, pair));
  }
  const note = (text, look) => add(card, "p", text, look + " note"), bad = card.querySelectorAll(".invented").length;
  if (bad) note(`${bad} quote${bad === 1 ? " does" : "s do"} not occur in the response: underlined in red.`, "wrong");
  if (traces.some(trace => quotes(trace) && !Object.values(shown(trace, pair)).every(whole)))
    note("Quotes not checked: this page does not hold the whole responses.", "soft");
  if (flips(traces))
    note(`Says ${traces[0].verdict} in both orders, so it picked a different response each time.`, "wrong");
  if (card.querySelector("ins")) note(`Underlined in blue: differs from the card of ${data.stages[against()]}.`, "soft");
}

function response(parent, pair, letter, text, votes) {
  const card = add(parent, "div", "", "card"), head = add(card, "h3", "Response " + letter);
  if (pair.better === letter) { card.classList.add("better"); add(head, "span", " better", "right"); }
  if (votes) add(head, "span", votes, "soft votes");
  add(card, "pre", text);
}

function show(pair) {
  const section = at("pair");
  section.replaceChildren();
  if (!pair) return void add(section, "p", "No pair is like that at this evaluation.", "soft");
  add(section, "h3", pair.id + (pair.kind ? ", " + pair.kind : ""));
  const strip = add(section, "p", "", "strip");
  add(strip, "span", "History:", "soft");
  for (const i of pair.traces.keys()) {
    const button = add(strip, "button", mark(pair, i) + " ", LOOK[mark(pair, i)] || "soft");
    add(button, "small", data.stages[i].replace(/^.* (?=step \d+$)/, ""));
    button.title = data.stages[i];
    if (i === now) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => move(i));
  }
  const [a, b, none] = pair.votes[now] || [], total = a + b + none, [question, ...texts] = pair.asked || [];
  const votes = several(pair, now) ? [`${a} of ${total} votes`, `${b} of ${total} votes`] : [];
  if (pair.asked) add(add(section, "div", "", "card"), "pre", question);
  else {
    add(section, "p", `Responses not shown: ${data.missing.join(", ") || "the data file"} was not found when this page was `
      + "written, or does not hold these pairs. Write the page again from the folder where that path begins, or put the "
      + "file beside the run.", "soft");
    add(section, "p", `Response ${pair.better} is better.`);
  }
  const responses = add(section, "div", "", "columns"), columns = add(section, "div", "", "columns");
  for (const [i, text] of texts.entries()) response(responses, pair, "AB"[i], text, votes[i]);
  if (votes.length && none) add(section, "p", `${none} of ${total} votes without a verdict`, "soft votes");
  section.append(columns);
  for (const i of new Set([against(), now])) if (data.stages[i] !== undefined) column(columns, pair, i);
}

// ---- which pairs ----

function list() {
  const nav = at("list"), scroll = nav.scrollTop, focused = nav.contains(document.activeElement);
  const kept = data.pairs.filter(pair => ["", "=" + pair.kind].includes(at("kind").value));
  const wanted = kept.filter(FILTERS[filter][0]);
  const checked = {
    "flips with the order": kept.some(pair => pair.traces[now].length === 2) || "not measured",
    "invented quotes": kept.some(pair => pair.asked) || "not checked",
  };
  for (const button of at("filter").children) {
    const known = checked[button.value] ?? true;
    button.textContent = `${button.value} (${known === true ? kept.filter(FILTERS[button.value][0]).length : known})`;
    button.setAttribute("aria-pressed", button.value === filter);
  }
  const compared = [...new Set([against(), now])].filter(i => i in data.stages);
  at("heads").replaceChildren();
  for (const name of ["pair", ...compared.map(i => data.stages[i])]) add(at("heads"), "span", name);
  chosen = wanted.includes(chosen) ? chosen : wanted[0];
  nav.replaceChildren();
  for (const pair of wanted) {
    const button = add(nav, "button", "", "row"), name = add(button, "span", pair.id);
    name.title = pair.id;
    for (const i of compared) add(button, "span", mark(pair, i), LOOK[mark(pair, i)] || "soft");
    button.addEventListener("click", event => {
      chosen = pair;
      list();
      if (event.isTrusted && matchMedia("(max-width: 700px)").matches) at("pair").scrollIntoView();
    });
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

// ---- tables and curves ----

function table(parent, [head, ...rows]) {  // the first column names the row
  const body = add(add(parent, "div", "", "wide"), "table"), line = add(add(body, "thead"), "tr");
  for (const text of head) add(line, "th", text).scope = "col";
  const lines = add(body, "tbody");
  for (const [name, ...cells] of rows) {
    const row = add(lines, "tr");
    add(row, "th", name).scope = "row";
    for (const text of cells) add(row, "td", text);
  }
}

function panel(parent, run, [title, remark, png, ends]) {
  const figure = add(parent, "figure");
  add(figure, "figcaption", title);
  if (png) {
    const image = add(add(figure, "div"), "img");
    image.alt = title + "; " + remark;
    image.src = "data:image/png;base64," + png;
  }
  add(figure, "small", remark);
  if (!ends) return;
  Object.assign(figure.dataset, {run, from: ends[0], to: ends[1]});
  figures.push(figure);
}

for (const [i, name] of data.stages.entries()) data.stages[i] = name.replace(/^curve\//, "several votes: ");
const [[, stages], ...tables] = data.tables;
table(at("table"), stages);
if (data.listed.length) {
  const found = data.listed.map(i => `${data.accuracy[i]} (${data.stages[i]}${STAGE[data.stages[i]] || ""})`);
  const both = data.pairs.some(pair => data.listed.some(i => pair.traces[i].length === 2));
  at("result").textContent = `Held-out accuracy: ${found.join(", ")}; ${data.total} pairs, ${both ? "both orders" : "one order"}.`;
}
for (const [name, model, steps, size, file, command] of data.runs) {
  const did = steps === "0" ? "judged" : `trained for ${Number(steps).toLocaleString("en")} steps of ${size} pairs on`;
  add(at("runs"), "p", `${name}: ${model} ${did} ${file}`);
  if (command) add(at("commands"), "p", "$ " + command);
}
at("commands").hidden = at("commands").children.length === 1;
for (const [name, panels] of data.curves) {
  add(at("curves"), "h2", name);
  const grid = add(at("curves"), "div", "", "grid");
  for (const one of panels) panel(grid, name.replace("Training: ", ""), one);
}
for (const [name, rows] of tables) {
  add(at("curves"), "h3", name);
  table(at("curves"), rows);
}

if (data.pairs.length) {
  if (!data.pairs.some(pair => pair.traces.flat().some(quotes))) delete FILTERS["invented quotes"];
  for (const name of Object.keys(FILTERS)) {
    const button = add(at("filter"), "button");
    button.value = name;
    button.title = FILTERS[name][1];
    button.addEventListener("click", () => { filter = name; list(); });
  }
  add(at("kind"), "option", "all").value = "";
  const kinds = [...new Set(data.pairs.map(pair => pair.kind))].sort();
  for (const kind of kinds) add(at("kind"), "option", kind || "-").value = "=" + kind;
  add(at("against"), "option", "the one before").value = "before";
  for (const [i, name] of data.stages.entries()) add(at("against"), "option", name).value = i;
  const [first, last] = [-1, -1, ...data.listed].slice(-2);
  at("against").value = first < 0 ? "before" : first;
  if (data.total > data.pairs.length) at("count").textContent = `This page holds ${data.pairs.length} of ${data.total} pairs, `
    + "those that the last stage changed first; the buttons count these.";
  for (const figure of figures) {
    const plot = figure.querySelector("div");
    add(plot, "i").hidden = true;
    plot.addEventListener("click", jump);
  }
  for (const id of ["kind", "against"]) at(id).addEventListener("change", list);
  at("list").addEventListener("keydown", keys);
  at("when").max = data.stages.length - 1;
  at("when").addEventListener("input", () => move(Number(at("when").value)));
  move(last);
}

function scrolls() {  // a table that is wider than the page says that it scrolls
  for (const box of document.querySelectorAll(".wide")) box.classList.toggle("more", box.scrollWidth > box.clientWidth);
}
addEventListener("resize", scrolls);
scrolls();
