// The page that look.py writes: a text, and what a memory looks up under each of its letters.
//
// A place is the number of a letter (of a token, with GPT-2's tokenizer), from 0. What is read at a
// place serves to guess the letter after it. All text is set as text: nothing in it can run.
// In order: the data, what is chosen, words, the text, the panel, busy slots, the page, its style.
"use strict";

// ---- The data -----------------------------------------------------------------------------------
const data = JSON.parse(document.getElementById("data").textContent);
const text = data.text;
const bytes = (packed) => Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
const pairs = (packed) => new Uint16Array(bytes(packed).buffer);

for (const model of data.models) {
  model.seen = pairs(model.seen);
  for (const way of [model.with, model.without]) {
    way.loss = pairs(way.loss);
    way.p = bytes(way.p);
  }

  // How much of a letter's loss the new blocks save, in nats. Nothing guesses the first one.
  model.gain = [0];
  model.with.loss.forEach((loss, i) => model.gain.push((model.without.loss[i] - loss) / 1000));
  for (const block of model.blocks) {
    block.slots = pairs(block.slots);
    for (const name of ["weights", "rows", "cols"]) block[name] = block[name] && bytes(block[name]);
  }
}

const firstAt = (block, head, at) => block.slots[(at * block.heads + head) * block.k];

// What a head read at a place, best first.
function readsAt(block, head, at) {
  const start = (at * block.heads + head) * block.k;
  const slots = block.slots.slice(start, start + block.k);
  return Array.from(slots, (slot, i) => ({ slot, weight: block.weights[start + i] / 255 }));
}

// The shade of row or column i: 0, or up to 3 if it was among the k best. Four lie in a byte.
function shadeAt(shades, block, head, at, i) {
  const number = (at * block.heads + head) * block.n + i;
  return (shades[number >> 2] >> (2 * (number & 3))) & 3;
}

// ---- What is chosen -----------------------------------------------------------------------------
// model, block, head and at are numbers from 0; kept is a busy slot; held: at no longer follows the
// hand. The address has them from 1, a block by its place in the stack: #block=2&head=1&at=417.
const chosen = { model: 0, block: 0, head: 0, at: 0, kept: null, held: false };
const model = () => data.models[chosen.model];
const block = () => model().blocks[chosen.block];

function readAddress() {
  const named = new URLSearchParams(location.hash.slice(1));
  const number = (name, most) => Math.min(Math.max(Number(named.get(name)) || 1, 1), most) - 1;
  chosen.model = number("model", data.models.length);
  const numbers = model().blocks.map((one) => one.number);
  chosen.block = Math.max(0, numbers.indexOf(Number(named.get("block"))));
  chosen.head = number("head", block().heads);
  chosen.at = number("at", text.length);
  chosen.held = named.has("at");
  chosen.kept = null;
}

// Browsers refuse many changes of the address in a row: it follows when the hand rests.
let timer;
function writeAddress() {
  clearTimeout(timer);
  timer = setTimeout(() => {
    const which = data.models.length > 1 ? `model=${chosen.model + 1}&` : "";
    const where = `block=${block().number}&head=${chosen.head + 1}&at=${chosen.at + 1}`;
    history.replaceState(null, "", `#${which}${where}`);
  }, 300);
}

// ---- Words --------------------------------------------------------------------------------------
// An element with attributes, and with children: elements, or text.
function make(tag, attributes = {}, ...children) {
  const space = ["svg", "rect", "path"].includes(tag) ? "2000/svg" : "1999/xhtml";
  const element = document.createElementNS(`http://www.w3.org/${space}`, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Spaces and ends of lines can be seen.
function visible(piece) {
  return piece.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

const code = (piece) => make("code", {}, visible(piece));
const count = (number) => number.toLocaleString("en");
const percent = (share) => (share < 0.005 ? "<1%" : `${Math.round(100 * share)}%`);

// The text before a place, its letter, and the text after it.
function snippet([before, here, after]) {
  const end = make("span", { class: "quiet" }, visible(after));
  return make("code", {}, visible(before), make("b", {}, visible(here)), end);
}

// ---- The text -----------------------------------------------------------------------------------
const letters = text.map((piece, place) => {
  const kind = piece.endsWith("\n") ? "end" : "";
  return make("span", { "data-place": place, class: kind }, piece);
});

function colourText() {
  // The colour is full at two nats: seven times as likely, or unlikely.
  const { name, gain } = model();
  letters.forEach((letter, place) => {
    letter.style.setProperty("--strength", Math.min(Math.abs(gain[place]) / 2, 1).toFixed(2));
    letter.classList.toggle("help", gain[place] > 0);
    letter.classList.toggle("harm", gain[place] < 0);
  });

  const mean = gain.reduce((sum, one) => sum + one, 0) / (text.length - 1);
  const helped = gain.filter((one) => one > 0).length / (text.length - 1);
  const saves = `${mean < 0 ? "costs" : "saves"} ${Math.abs(mean).toFixed(2)} nats a ${data.unit}`;
  parts.sum.textContent =
    `The memory of ${name} ${saves} of this text; it helps on ${percent(helped)} of them.`;
}

// Marks the chosen place, and all that read the same slot first; of a kept slot, for any head.
function markText() {
  const { head, at, kept } = chosen;
  const heads = [...Array(block().heads).keys()];
  const same = letters.filter((letter, place) => {
    const isSame = firstAt(block(), head, place) === firstAt(block(), head, at);
    const isKept = heads.some((one) => firstAt(block(), one, place) === kept);
    letter.classList.toggle("same", isSame);
    letter.classList.toggle("kept", isKept);
    letter.classList.toggle("here", place === at);
    letter.classList.toggle("next", place === at + 1);
    return isSame;
  });
  return same.length;
}

// ---- The panel: what was read at a place, and what came of it -----------------------------------
const SIDE = 256; // of the grid
const EDGE = 16; // left of it and on top: the scores of rows and columns

function drawGrid(reads) {
  const { n, rows, cols } = block();
  const cell = SIDE / n;
  const grid = make("svg", { id: "grid", viewBox: `0 0 ${SIDE + EDGE + 2} ${SIDE + EDGE + 2}` });
  const rect = (x, y, width, height, more) => {
    grid.append(make("rect", { x, y, width, height, ...more }));
  };

  // A chessboard; where squares are very small they would only look grey.
  rect(EDGE, EDGE, SIDE, SIDE, { class: "board" });
  let dark = "";
  for (let i = 0; i < n * n && n <= 64; i++) {
    const [row, col] = [Math.floor(i / n), i % n];
    const corner = `M${EDGE + col * cell} ${EDGE + row * cell}`;
    if ((row + col) % 2) dark += `${corner}h${cell}v${cell}h${-cell}z`;
  }
  grid.append(make("path", { d: dark, class: "dark" }));

  // The k best rows and columns.
  for (let i = 0; i < n && rows; i++) {
    const row = shadeAt(rows, block(), chosen.head, chosen.at, i);
    const col = shadeAt(cols, block(), chosen.head, chosen.at, i);
    rect(0, EDGE + i * cell, EDGE - 4, cell, { class: "score", opacity: row / 3 });
    rect(EDGE + i * cell, 0, cell, EDGE - 4, { class: "score", opacity: col / 3 });
  }

  // The slots that won; very small ones are drawn larger than they are.
  const square = (slot, more) => {
    const size = Math.max(cell, 6);
    const x = EDGE + ((slot % n) + 0.5) * cell - size / 2;
    const y = EDGE + (Math.floor(slot / n) + 0.5) * cell - size / 2;
    rect(x, y, size, size, more);
  };
  for (const { slot, weight } of reads) {
    const opacity = 0.25 + (0.75 * weight) / reads[0].weight;
    square(slot, { class: "lit", "data-slot": slot, "data-weight": weight, opacity });
  }
  square(reads[0].slot, { class: "first" });
  if (chosen.kept !== null) square(chosen.kept, { class: "keptslot" });
  return grid;
}

// The five likeliest letters after the place; the one that comes is blue.
function drawBars(title, way) {
  const bars = make("div", { class: "bars" }, make("h3", {}, title));
  way.best[chosen.at].forEach((piece, i) => {
    const p = way.p[5 * chosen.at + i] / 255;
    const name = make("code", {}, visible(piece));
    if (piece === text[chosen.at + 1]) name.className = "comes";
    const bar = make("i", { style: `width: ${Math.round(60 * p)}%` });
    bars.append(make("div", {}, name, bar, percent(p)));
  });
  return bars;
}

function showPanel(same) {
  const { at, head } = chosen;
  const { n, orders } = block();
  const reads = readsAt(block(), head, at);

  const before = text.slice(Math.max(0, at - 14), at).join("").slice(-14);
  const story = make("p", {}, "After ", snippet([before, text[at], ""]));
  if (at + 1 < text.length) {
    const sure = (way) => percent(Math.exp(-way.loss[at] / 1000));
    story.append(" comes ", code(text[at + 1]), `, of which it was ${sure(model().with)} sure; `);
    story.append(`without the memory, ${sure(model().without)}.`);
  } else {
    story.append(" the text ends.");
  }
  if (chosen.held) story.append(" Held: click it again to let go.");

  // How the slots were found.
  const found = make("p");
  if (orders) {
    const start = at + 1 - Math.min(orders[head], model().seen[at]);
    const gram = text.slice(start, at + 1).join("");
    found.append(code(gram), ` names slot ${reads[0].slot} of ${n} × ${n}.`);
  } else {
    const best = reads.slice(0, 4).map(({ slot, weight }) => `${slot} (${percent(weight)})`);
    const others = reads.length > 4 ? ` and ${reads.length - 4} more` : "";
    const [row, column] = [Math.floor(reads[0].slot / n), reads[0].slot % n];
    found.append(`Of ${n} × ${n} slots it read ${best.join(", ")}${others}. The first is in row `);
    found.append(`${row}, column ${column}, from 0. At the edges: the best rows and columns.`);
  }

  const { slot } = reads[0];
  const firsts = new Set(text.map((piece, place) => firstAt(block(), head, place))).size;
  const summary =
    `Slot ${slot} is this head's first choice at ${count(same)} of ${count(text.length)} ` +
    `${data.unit}s, all framed. Its first choices here: ${count(firsts)} of ${count(n * n)} slots.`;
  const bars = [drawBars("with the memory", model().with), drawBars("without", model().without)];
  parts.panel.replaceChildren(
    story,
    make("div", { class: "two" }, ...bars),
    drawGrid(reads),
    found,
    make("p", { class: "quiet" }, summary),
  );
}

// ---- Busy slots ---------------------------------------------------------------------------------
function shares(pieces, total) {
  return pieces.flatMap(([piece, times]) => [code(piece), ` ${percent(times / total)} `]);
}

function showSlot(one) {
  const times = `first choice at ${count(one.places)} places: `;
  const about = make("p", {}, `Slot ${one.slot} is some head's ${times}`);
  about.append(...shares(one.letters, one.places), "– most often at the end of ");
  about.append(...shares(one.ends, one.places));

  const [before, after] = one.loss.map((loss) => loss.toFixed(3));
  const [sure, less] = one.p.map(percent);
  const zeroed = make("p", {}, `Tried at ${one.tried} of them: with its entry zeroed the loss `);
  zeroed.append(`goes from ${before} to ${after} nats. Worst: after `);
  zeroed.append(snippet([one.worst[0], one.worst[1], ""]), " comes ", code(one.next));
  zeroed.append(`, of which it was ${sure} sure, and now ${less}.`);
  const places = make("div", { class: "places" }, ...one.examples.map(snippet));
  return make("div", { class: "card" }, about, zeroed, places);
}

function showBusy() {
  const { busy, number } = block();
  const list = make("div", { class: "buttons" });
  for (const one of busy) {
    const isKept = chosen.kept === one.slot;
    const button = make("button", { "aria-pressed": isKept }, `${one.slot} `);
    button.append(...shares(one.letters.slice(0, 1), one.places));
    button.onclick = () => {
      chosen.kept = isKept ? null : one.slot;
      show();
    };
    list.append(button);
  }
  const lead =
    `Those that its heads chose first most often in ${count(data.stretch)} ${data.unit}s of ` +
    `validation text, and the ${data.unit} that read each most. Choose one to see its places.`;
  const title = make("h2", {}, `The ${busy.length} busiest slots of block ${number}`);
  parts.busy.replaceChildren(title, make("p", { class: "quiet" }, lead), list);
  parts.busy.append(...busy.filter((one) => one.slot === chosen.kept).map(showSlot));
}

// ---- The page -----------------------------------------------------------------------------------
function makeButtons(name, words) {
  const group = make("div", { class: "buttons" }, make("span", { class: "quiet" }, name));
  words.forEach((word, i) => {
    const button = make("button", { "aria-pressed": chosen[name] === i }, word);
    button.onclick = () => {
      chosen[name] = i;
      if (name !== "head") chosen.kept = null;
      chosen.block = Math.min(chosen.block, model().blocks.length - 1);
      chosen.head = Math.min(chosen.head, block().heads - 1);
      show();
    };
    group.append(button);
  });
  return group;
}

function show() {
  const models = data.models.map((one) => one.name);
  const blocks = model().blocks.map((one) => String(one.number));
  const { heads, orders } = block();
  const words = [...Array(heads).keys()].map((head) => {
    return orders ? `${head + 1} (last ${orders[head]})` : String(head + 1);
  });
  parts.choices.replaceChildren(makeButtons("block", blocks), makeButtons("head", words));
  if (models.length > 1) parts.choices.prepend(makeButtons("model", models));
  colourText();
  showBusy();
  showPlace();
}

function showPlace() {
  showPanel(markText());
  writeAddress();
}

function go(place, held) {
  chosen.at = Math.min(Math.max(place, 0), text.length - 1);
  chosen.held = held;
  showPlace();
}

const scrollThere = () => letters[chosen.at].scrollIntoView({ block: "nearest" });

const parts = { text: make("pre", { id: "text" }, ...letters) };
for (const id of ["sum", "choices", "panel", "busy"]) parts[id] = make("div", { id });

// The place follows the hand; a click holds it, and lets go of it.
parts.text.addEventListener("mouseover", ({ target }) => {
  if (target.dataset.place && !chosen.held) go(Number(target.dataset.place), false);
});
parts.text.addEventListener("click", ({ target }) => {
  const place = Number(target.dataset.place);
  if (target.dataset.place) go(place, !(chosen.held && place === chosen.at));
});
document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  go(chosen.at + step, true);
  scrollThere();
});
window.addEventListener("hashchange", () => {
  readAddress();
  show();
  scrollThere();
});

// ---- Style --------------------------------------------------------------------------------------
const STYLE = `
  :root { color-scheme: light dark; --ground: #fbfaf8; --card: #fff; --ink: #1f2328;
    --line: #d9d6d0; --quiet: #59616b; --green: 70 178 112; --red: 236 116 108; --amber: #b35900;
    --blue: #0550ae; --violet: #7d3cc9; --shade: #f1efeb; }
  @media (prefers-color-scheme: dark) { :root { --ground: #12161b; --card: #1a2027; --ink: #e6edf3;
    --line: #323a44; --quiet: #a0aab4; --green: 32 116 64; --red: 158 52 52; --amber: #f0a33c;
    --blue: #79b8ff; --violet: #c79bff; --shade: #222a33; } }
  * { box-sizing: border-box; }
  body { margin: 0 auto; padding: 24px 20px 48px; max-width: 1180px; background: var(--ground);
    color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
  h1 { margin: 0; font-size: 24px; }
  h2 { margin: 32px 0 4px; font-size: 18px; }
  h3 { margin: 0 0 4px; font-size: 13px; font-weight: 600; color: var(--quiet); }
  p { margin: 0 0 10px; }
  .quiet { color: var(--quiet); }
  pre, code { font: 13px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
  code { overflow-wrap: anywhere; }
  code b { color: var(--violet); }
  p code { padding: 1px 4px; background: var(--shade); border-radius: 4px; }
  #sum { margin: 4px 0 6px; font-size: 18px; }
  .scale { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: center; font-size: 13px; }
  .scale i { width: 140px; height: 12px; border-radius: 3px; border: 1px solid var(--line);
    background: linear-gradient(90deg, rgb(var(--red)), var(--card), rgb(var(--green))); }
  #choices { display: flex; flex-wrap: wrap; gap: 8px 24px; margin: 16px 0 12px; }
  .buttons { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
  button { font: inherit; font-size: 14px; padding: 3px 11px; color: var(--ink); cursor: pointer;
    background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
  button[aria-pressed="true"] { color: var(--ground); background: var(--ink); }
  main { display: grid; grid-template-columns: minmax(0, 1fr) 372px; gap: 20px; }
  #text, #panel, .card { padding: 14px 16px; background: var(--card); border: 1px solid var(--line);
    border-radius: 8px; }
  #text { margin: 0; height: 0; min-height: 100%; overflow-y: auto; font-size: 14px;
    cursor: default; white-space: pre-wrap; overflow-wrap: anywhere; }
  #text span { border-radius: 2px; padding: 1px 0; }
  #text .help { background: rgb(var(--green) / var(--strength)); }
  #text .harm { background: rgb(var(--red) / var(--strength)); }
  #text .end::before { content: "↵"; opacity: 0.4; }
  #text .kept { outline: 1px dashed var(--violet); outline-offset: -1px; }
  #text .same { box-shadow: inset 0 0 0 1.5px var(--amber); }
  #text .next { box-shadow: inset 0 -3px 0 var(--blue); }
  #text .here { outline: 2px solid var(--blue); }
  #panel p:last-child { margin: 0; }
  .two { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin-bottom: 12px; }
  .bars div { display: flex; align-items: center; gap: 6px; height: 20px; font-size: 12px; }
  .bars code { min-width: 16px; max-width: 60px; overflow: hidden; white-space: pre; flex: none; }
  .bars i { height: 10px; min-width: 1px; background: var(--quiet); border-radius: 2px; }
  .comes { color: var(--blue); font-weight: 700; }
  #grid { display: block; width: 100%; max-width: 310px; margin: 0 auto 10px; }
  .board { fill: var(--card); stroke: var(--line); }
  .dark { fill: var(--shade); }
  .score, .lit { fill: var(--amber); }
  .first { fill: none; stroke: var(--ink); stroke-width: 1.5; }
  .keptslot { fill: none; stroke: var(--violet); stroke-width: 2; }
  .card { margin-top: 14px; }
  .places { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr));
    gap: 2px 16px; }
  .places code { white-space: pre; overflow: hidden; }
  @media (max-width: 800px) {
    main { grid-template-columns: minmax(0, 1fr); }
    #text { height: auto; min-height: 0; max-height: 44vh; }
  }
`;

const lead =
  `A memory block has a table of slots. At every ${data.unit} each of its heads reads some of ` +
  `them, to help guess the next ${data.unit}. Green ${data.unit}s were made likelier by all new ` +
  "blocks together, red ones less likely; without the memory means: with these blocks skipped. " +
  `Point at a ${data.unit} (a click holds it) or use the arrow keys, to see what was looked up.`;
const scale = ["less likely, −2 nats", make("i"), "+2 nats, more likely (0.7: twice as likely)"];
document.head.append(make("style", {}, STYLE));
document.body.append(
  make("h1", {}, "What a memory looks up"),
  parts.sum,
  make("p", { class: "quiet" }, lead),
  make("p", { class: "scale quiet" }, ...scale),
  parts.choices,
  make("main", {}, parts.text, parts.panel),
  parts.busy,
);

// It opens where the memory helps most, among the letters that one sees at first.
const start = model().gain.slice(0, 500);
chosen.at = Math.max(0, start.indexOf(Math.max(...start)) - 1);
if (location.hash) readAddress();
show();
if (location.hash) scrollThere();
