// One answer on the page: its text, tinted by the steps that gave it, and its figures. What a model says is only ever
// the text of a node.

import { Count } from "./client.js";

export function element(tag, className = "", text = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  node.append(...children);
  return node;
}

export const shown = (number, digits) => (Number.isFinite(number) ? number.toFixed(digits) : "–");

export class AnswerView {
  text = "";
  count = new Count();

  constructor(title) {
    this.rate = element("b");
    this.speed = element("b");
    this.body = element("div", "text");
    this.footer = element("div", "footer");
    const header = element("header", "", "", element("h3", "", title),
      element("span", "figure", "", this.rate, " tokens/step"),
      element("span", "figure", "", this.speed, " tokens/s"));
    this.root = element("article", "answer", "", header, this.body, this.footer);
    this.root.setAttribute("aria-label", title);
    this.showFigures();
  }

  wait(reason) {
    this.body.replaceChildren(element("span", "waiting", reason));
  }

  begin() {
    this.count = new Count();
    this.body.replaceChildren();
    this.setBusy(true);
  }

  add(chunk) {
    const text = chunk.choices[0]?.delta?.content;
    if (text) this.addStep(text, this.count.text(chunk.usage?.completion_tokens));
    else if (!chunk.choices.length) this.count.settle(chunk.usage, chunk.metrics?.speculative_decoding);
    this.showFigures();
  }

  // `tokens` is 0 where the server does not tell how many a step gave.
  addStep(text, tokens) {
    const parity = this.body.childElementCount % 2 ? "odd" : "even";
    const space = text.slice(0, text.length - text.trimStart().length); // a tint at a line's end would hang over it
    const step = element("span", `step ${parity} t${tokens ? Math.min(tokens, 5) : 2}`, text.slice(space.length));
    if (tokens) step.title = tokens === 1 ? "1 token" : `${tokens} tokens that came together`;
    this.body.append(space, step);
    this.text += text;
  }

  showFigures() {
    this.rate.textContent = shown(this.count.perStep, 2);
    this.speed.textContent = shown(this.count.perSecond, 1);
  }

  end(settings, stopped) {
    const { count } = this;
    this.setBusy(false);
    const told = stopped ? ["Stopped"] : [];
    if (count.first && count.tokens) told.push(`${count.tokens} tokens in ${count.steps + 1} steps`);
    if (count.first) told.push(`first after ${count.firstAfter.toFixed(2)} s`);
    this.footer.append(bars(count.histogram), ...[...told, settings].map((each) => element("span", "", each)));
  }

  fail(error, retry) {
    this.setBusy(false);
    if (!this.text) this.body.replaceChildren();
    const again = element("button", "", "Try again");
    again.type = "button";
    again.addEventListener("click", retry);
    const box = element("div", "failure", "", element("span", "", error.message), again);
    box.setAttribute("role", "alert");
    this.root.append(box);
  }

  setBusy(is) {
    this.root.classList.toggle("busy", is);
    this.root.setAttribute("aria-busy", String(is)); // read out when it is whole, not word by word
  }
}

// How many steps gave 1, 2, 3 … tokens.
function bars(histogram) {
  const length = histogram.findLastIndex((steps) => steps) + 1;
  const counts = Array.from({ length }, (_, index) => histogram[index] ?? 0);
  const row = element("div", "bars", "", ...counts.map((steps, index) => {
    const bar = element("i");
    bar.style.height = `${(1.5 * steps) / Math.max(...counts)}rem`;
    return element("span", "", "", bar, String(index + 1));
  }));
  row.hidden = !length;
  row.title = `Steps by the tokens they gave: ${counts.map((steps, index) => `${steps} gave ${index + 1}`).join(", ")}`;
  row.setAttribute("role", "img");
  row.setAttribute("aria-label", row.title);
  return row;
}

// The two answers to one question beside each other; null where there is too little to compare. `exact`: the scheme's
// law is that both are the same text.
export function verdict(medusa, plain, exact) {
  const ratio = medusa.count.perSecond / plain.count.perSecond;
  if (!Number.isFinite(ratio)) return null;
  const line = element("p", "verdict", "", element("b", "", `${ratio.toFixed(2)} ×`), " the speed of plain decoding.");
  if (medusa.text === plain.text) line.append(" Both answers are the same text.");
  else if (exact) line.append(" The answers part where two tokens are as likely to within the arithmetic’s precision.");
  return line;
}
