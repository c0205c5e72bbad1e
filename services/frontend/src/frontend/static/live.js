// The live page: parts of it come as server-sent events; and it can keep ordering. Without this file it stands still.
"use strict";

(() => {
  const watch = document.querySelector("[data-watch]");
  if (!watch) return;
  const find = (selector, root = watch) => root.querySelector(selector);
  const link = find("[data-link]");
  const news = find("[data-news]");

  // --- the stream ---------------------------------------------------------------------------------------

  function adopt(name, html) {
    const place = find(`[data-part="${name}"]`);
    const first = place.dataset.streamed === undefined;
    place.dataset.streamed = "";
    place.innerHTML = html; // made by our own templates, which escape every value
    dispatchEvent(new Event("adopted")); // app.js: countdowns
    if (name !== "changes" || first) return;
    const row = find("tbody tr", place);
    if (!row) return;
    row.classList.add("changed");
    news.textContent = `${row.cells[1].textContent.trim()} replaced; ${row.cells[3].textContent.trim()} meanwhile`;
  }

  function listen() {
    const events = new EventSource("/live/events");
    events.addEventListener("open", () => {
      watch.classList.remove("cut-off");
      link.textContent = "Live.";
    });
    for (const name of ["services", "tally", "changes", "denials"]) {
      events.addEventListener(name, (event) => adopt(name, event.data));
    }
    events.addEventListener("error", () => {
      watch.classList.add("cut-off");
      link.textContent = "The frontend does not answer; asking again.";
      if (events.readyState === EventSource.CLOSED) setTimeout(listen, 3000); // else the browser does it
    });
  }

  // --- keep ordering ------------------------------------------------------------------------------------

  const form = find("[data-keep]");
  const button = find("[data-toggle]");
  const ordered = find("[data-ordered]");
  const EVERY = 1000;
  let keeping = false;
  const count = { placed: 0, failed: 0 };
  let lost = "";

  async function order() {
    const body = new URLSearchParams(new FormData(form));
    body.set("key", crypto.randomUUID());
    try {
      // The answer to a placed order leads to its page, which nobody looks at here.
      const answer = await fetch("/orders", { method: "POST", body, redirect: "manual", headers: { Accept: "application/json" } });
      if (answer.type === "opaqueredirect") count.placed += 1;
      else {
        count.failed += 1;
        lost = (await answer.json().catch(() => ({}))).reason ?? `HTTP ${answer.status}`;
      }
    } catch {
      count.failed += 1;
      lost = "the frontend did not answer";
    }
    ordered.textContent = `${count.placed} placed, ${count.failed} failed${lost ? ` (${lost})` : ""}.`;
    ordered.classList.toggle("bad", count.failed > 0);
  }

  async function keepOrdering() {
    while (keeping) {
      await Promise.all([order(), new Promise((wake) => setTimeout(wake, EVERY))]);
    }
  }

  function keep(on) {
    if (keeping === on) return;
    keeping = on;
    button.setAttribute("aria-pressed", String(on));
    button.textContent = on ? "Stop ordering" : "Keep ordering";
    if (on) keepOrdering();
  }

  button.addEventListener("click", () => keep(!keeping));
  addEventListener("pagehide", () => keep(false));
  document.addEventListener("visibilitychange", () => document.hidden && keep(false));
  listen();
})();
