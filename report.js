"use strict";
const at = id => document.getElementById(id), data = JSON.parse(at("data").textContent);
const tick = right => right === null ? "·" : right ? "✓" : "✗";
const look = right => right === null ? "soft" : right ? "right" : "wrong";
function add(parent, tag, text = "", look = "") {  // the only way a text enters the page: as text
  const node = document.createElement(tag);
  node.textContent = text; node.className = look; parent.append(node);
  return node;
}
function show(pair) {
  const section = at("pair");
  section.replaceChildren();
  add(section, "h3", pair.id + (pair.kind ? ", " + pair.kind : ""));
  const [question, ...texts] = pair.asked || [];
  if (pair.asked) add(add(section, "div", "", "card"), "pre", question);
  else add(section, "p", "The data file is not there any more; response " + pair.better + " is better.", "soft");
  const responses = add(section, "div", "", "columns"), columns = add(section, "div", "", "columns");
  for (const [i, text] of texts.entries()) {
    const card = add(responses, "div", "", "card"), head = add(card, "h3", "Response " + "AB"[i]);
    if (pair.better === "AB"[i]) add(head, "span", " better", "right");
    add(card, "pre", text);
  }
  for (const [i, traces] of pair.traces.entries()) {
    const card = add(columns, "div", "", "card");
    if (!traces.length) add(card, "h3", data.stages[i] + ": not judged");
    for (const trace of traces) {
      const head = add(card, "h3", data.stages[i] + (trace.order === "BA" ? ", B shown as A " : " "));
      const verdict = trace.verdict ? "says " + trace.verdict + " " : "no verdict ";
      add(head, "span", verdict + tick(trace.right), look(trace.right));
      if (trace.cut) add(head, "span", " cut off", "soft");
      add(card, "pre", trace.text);
    }
  }
}
function fits(pair) {
  const [last, before] = pair.right.slice().reverse(), kind = at("kind").value;
  const changed = pair.right.length > 1 && last !== before;
  const wanted = {all: true, right: last === true, wrong: last === false, changed: changed};
  return wanted[at("filter").value] && (kind === "" || kind === "=" + pair.kind);
}
function list() {
  const wanted = data.pairs.filter(fits);
  at("list").replaceChildren(); at("pair").replaceChildren();
  at("count").textContent = wanted.length + " of " + data.total + " pairs";
  for (const pair of wanted) {
    const button = add(at("list"), "button"), name = add(button, "span", pair.id), marks = add(button, "span");
    name.title = pair.id;
    for (const right of pair.right) add(marks, "span", tick(right), look(right));
    button.addEventListener("click", () => {
      at("list").querySelector("[aria-current]")?.removeAttribute("aria-current");
      button.setAttribute("aria-current", "true");
      show(pair);
    });
  }
  at("list").querySelector("button")?.click();
}
if (data.pairs.length) {
  add(at("kind"), "option", "all").value = "";
  const kinds = [...new Set(data.pairs.map(pair => pair.kind))].sort();
  for (const kind of kinds) add(at("kind"), "option", kind || "-").value = "=" + kind;
  for (const id of ["filter", "kind"]) at(id).addEventListener("change", list);
  list();
}
