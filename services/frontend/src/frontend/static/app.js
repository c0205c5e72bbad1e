// The pages work without this file. It adds a running total, countdowns, copy buttons and live status.
"use strict";

const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

// --- time ---------------------------------------------------------------------------------------------

function span(seconds) {
  const whole = Math.floor(Math.abs(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
  return whole < 48 * 3600 ? `${Math.floor(whole / 3600)} h` : `${Math.floor(whole / 86400)} d`;
}

function tick() {
  for (const element of $$("[data-until]")) {
    const seconds = (Date.parse(element.dataset.until) - Date.now()) / 1000;
    const text = seconds > 0 ? `${span(seconds)} left` : `${element.dataset.past} ${span(seconds)} ago`.trim();
    if (element.textContent !== text) element.textContent = text;
  }
}

// --- copying ------------------------------------------------------------------------------------------

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

function addCopyButtons(root = document) {
  if (!navigator.clipboard) return;
  for (const element of $$("[data-copy]", root)) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.setAttribute("aria-label", `Copy ${element.dataset.copy}`);
    button.append(icon("copy"));
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(element.dataset.copy);
      button.classList.add("done");
      button.replaceChildren(icon("check"));
      setTimeout(() => {
        button.classList.remove("done");
        button.replaceChildren(icon("copy"));
      }, 1600);
    });
    (element.querySelector(".seg:last-child") ?? element).append(button); // never alone on a line
  }
}

// --- the order form -----------------------------------------------------------------------------------

function setUpGoods(form) {
  const inputs = $$("input[data-price]", form);
  const total = form.querySelector("[data-total]");
  if (!inputs.length || !total) return;
  const output = total.querySelector("output");
  const { currency } = inputs[0].dataset;
  const money = new Intl.NumberFormat("en-IE", { style: "currency", currency });
  const quantity = (input) => (/^\d{1,2}$/.test(input.value.trim()) ? Number(input.value) : 0);

  const add = () => {
    const minor = inputs.reduce((sum, input) => sum + quantity(input) * Number(input.dataset.price), 0);
    output.textContent = money.format(minor / 100);
  };
  const step = (input, by) => {
    input.value = String(Math.min(99, Math.max(0, quantity(input) + by)));
    add();
  };

  for (const input of inputs) {
    const name = form.querySelector(`label[for="${input.id}"]`).textContent;
    for (const [by, sign, label, where] of [
      [-1, "−", `One ${name} less`, "before"],
      [1, "+", `One ${name} more`, "after"],
    ]) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "step";
      button.tabIndex = -1; // with a keyboard the arrow keys in the field do the same
      button.textContent = sign;
      button.setAttribute("aria-label", label);
      button.addEventListener("click", () => step(input, by));
      input[where](button);
    }
    input.addEventListener("input", add);
    input.addEventListener("focus", () => input.select());
    input.addEventListener("keydown", (event) => {
      const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      step(input, by);
    });
  }
  form.querySelector("[data-static]").hidden = true;
  total.hidden = false;
  add();
}

// The server takes a form once however often it is sent; this only says that it is on its way.
function setUpSending(form) {
  const button = form.querySelector("button[type=submit]");
  const text = button.textContent;
  form.addEventListener("submit", (event) => {
    if (button.getAttribute("aria-disabled") === "true") return event.preventDefault();
    button.setAttribute("aria-disabled", "true");
    button.textContent = "Ordering…";
    return undefined;
  });
  window.addEventListener("pageshow", () => {
    button.removeAttribute("aria-disabled");
    button.textContent = text;
  });
}

// --- live status --------------------------------------------------------------------------------------

const EVERY = 5000;

// What is renewed while one watches: the element that holds it, whose it is, its version, what to say of it.
const RENEWED = [
  ["[data-serial]", "service", "serial", "got a new certificate"],
  ["[data-version]", "login", "version", "took up a new database password"],
];

function held() {
  return new Map(
    RENEWED.flatMap(([selector, whose, which, news]) =>
      $$(selector).map((element) => [
        `${element.dataset[whose]} ${news}`,
        { element, version: element.dataset[which] },
      ]),
    ),
  );
}

function logRotations(before, after) {
  const section = document.querySelector("[data-rotations]");
  if (!section) return;
  const list = section.querySelector(".log");
  for (const [news, { element, version }] of after) {
    const old = before.get(news)?.version;
    if (!old || old === version) continue;
    list.querySelector(".empty")?.remove();
    const item = document.createElement("li");
    const time = new Date().toISOString().slice(11, 19);
    item.textContent = `${time}  ${news}: ${old.slice(0, 8)}… → ${version.slice(0, 8)}…`;
    list.prepend(item);
    while (list.children.length > 20) list.lastElementChild.remove();
    element.classList.add("changed");
  }
}

async function refresh() {
  if (document.hidden) return;
  const response = await fetch("/status", { headers: { Accept: "text/html" } });
  if (!response.ok) return;
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  const before = held();
  for (const region of $$("[data-live]")) {
    const next = fresh.querySelector(`[data-live="${region.dataset.live}"]`);
    if (!next || region.contains(document.activeElement)) continue;
    const adopted = document.importNode(next, true);
    region.replaceWith(adopted);
    addCopyButtons(adopted);
  }
  logRotations(before, held());
  tick();
}

async function keepFresh() {
  try {
    await refresh();
  } catch {
    // The frontend itself does not answer: what is shown stays, the next turn asks again.
  }
  setTimeout(keepFresh, EVERY);
}

// --- begin --------------------------------------------------------------------------------------------

addCopyButtons();
addEventListener("adopted", tick);
tick();
setInterval(tick, 1000);
for (const form of $$("form[data-order]")) {
  setUpGoods(form);
  setUpSending(form);
}
document.querySelector("[data-focus]")?.focus();
if (document.querySelector("[data-look-again]")) setTimeout(() => location.reload(), 4000);
if (document.querySelector("[data-live]")) {
  const rotations = document.querySelector("[data-rotations]");
  if (rotations) rotations.hidden = false;
  setTimeout(keepFresh, EVERY);
}
