// The attack lab. The page works without this file (reload to see); it shows what happens while it happens.
"use strict";

(() => {
  const lab = document.querySelector("[data-lab]");
  if (!lab) return;
  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  const stage = find("[data-stage]", lab);
  const marker = find("[data-marker]", lab); // the attack, at the control that stopped it
  const ghost = find("[data-ghost]", lab); // the same attack where that control was left out
  const caption = find("[data-caption]", lab);
  const title = find("[data-stage-title]", lab);
  const progress = find("[data-progress]", lab);
  const shown = find("[data-evidence]", lab);
  const template = find("[data-evidence-template]");
  const rows = new Map(all("[data-attack]").map((row) => [row.dataset.attack, row]));
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const proofs = new Map();

  const TRAVEL = 550;
  const name = (row) => find("h3", row).textContent;
  const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

  // --- the drawn chain ----------------------------------------------------------------------------------

  const part = (at) => find(`[data-at="${at}"]`, stage);

  function middle(at) {
    const disc = find(".disc", part(at)).getBoundingClientRect();
    const ground = stage.getBoundingClientRect();
    return { x: disc.left - ground.left + disc.width / 2, y: disc.top - ground.top + disc.height / 2, r: disc.width / 2 };
  }

  // Up to the edge of where it goes: nothing that is refused gets in.
  async function travel(what, from, to, through) {
    const [start, end] = [middle(from), middle(to)];
    const length = Math.hypot(end.x - start.x, end.y - start.y) || 1;
    const short = through ? 0 : (end.r + 12) / length;
    const stop = { x: end.x - (end.x - start.x) * short, y: end.y - (end.y - start.y) * short };
    const place = ({ x, y }) => `translate(${x}px, ${y}px)`;
    what.hidden = false;
    what.style.transform = place(stop);
    if (still.matches || document.hidden) return;
    const way = what.animate([{ transform: place(start) }, { transform: place(stop) }], { duration: TRAVEL, easing: "ease-in-out" });
    await way.finished.catch(() => {}); // a newer step takes its place
  }

  function clear() {
    marker.hidden = ghost.hidden = true;
    for (const each of all("[data-at]", stage)) each.classList.remove("held", "open", "aimed");
  }

  async function act({ row, step, proof }) {
    const target = row.dataset.target;
    if (step === "rightful") {
      clear();
      title.textContent = name(row);
      part(target).classList.add("aimed");
      caption.textContent = "First the rightful call: it must succeed.";
    } else if (step === "attempt") {
      caption.textContent = "Now the attacker.";
      await travel(marker, "attacker", target);
    } else if (step === "refused" || step === "without") {
      if (marker.hidden) await travel(marker, "attacker", target);
      part(target).classList.add("held");
      show(row, proof);
      const without = [proof, ...proof.further].map((each) => each.control).join(" and ");
      caption.textContent = `Refused by ${proof.control}: ${proof.reason}. The same again, without ${without} …`;
    } else if (step === "done") {
      await conclude(row, proof);
    }
  }

  async function conclude(row, proof) {
    const target = row.dataset.target;
    title.textContent = name(row);
    show(row, proof);
    if (proof.fault) {
      part(target).classList.remove("held");
      part(target).classList.add("open");
      caption.textContent = `Not proved: ${proof.fault}`;
      return;
    }
    part(target).classList.add("held");
    await travel(ghost, "attacker", target, true);
    caption.textContent = `Refused by ${proof.control}: ${proof.reason}. Without this control ${outcome(proof)}.`;
  }

  // What came of it with one control more left out each time, to the end, or as far as it has come.
  const outcome = (proof, seen = () => "") => {
    const stops = proof.further.map((stop) => `${stop.control} stops it${seen(stop)}`);
    const end = proof.seen_without ? [`it succeeds${seen({ seen: proof.seen_without })}`] : [];
    return [...stops, ...end].join("; without that, too, ");
  };

  // Steps come faster than they can be watched: they are shown one after the other, and when the page falls
  // behind, it leaves out all but the latest attack.
  let acts = [];
  let acting = false;

  async function play(steps) {
    acts.push(...steps);
    if (acting) return;
    acting = true;
    while (acts.length) {
      if (acts.length > 8) acts = acts.filter((each) => each.row === acts.at(-1).row);
      await act(acts.shift());
    }
    acting = false;
  }

  // --- evidence -----------------------------------------------------------------------------------------

  function fill(place, row, proof) {
    const facts = document.importNode(template.content, true);
    const put = (fact, text) => (find(`[data-fact="${fact}"]`, facts).textContent = text);
    put("control", proof.control);
    put("promise", row.dataset.promise);
    put("reason", proof.reason);
    put("peer", proof.line.peer_id ?? "none");
    put("seen", proof.seen);
    put("line", Object.keys(proof.line).length ? JSON.stringify(proof.line, null, 2) : lab.dataset.noLine);
    find('[data-fact="control"]', facts).className = "reason";
    put("ablation", outcome(proof, (stop) => `: ${stop.seen}`) || "trying …");
    put("fault", proof.fault);
    find(".fault", facts).hidden = !proof.fault;
    place.replaceChildren(facts);
  }

  function show(row, proof) {
    fill(shown, row, proof);
  }

  // --- the list -----------------------------------------------------------------------------------------

  function icon(name) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
    svg.setAttribute("class", "icon");
    svg.setAttribute("aria-hidden", "true");
    use.setAttribute("href", `#icon-${name}`);
    svg.append(use);
    return svg;
  }

  function mark(row, kind, sign, text) {
    row.classList.remove("waits", "runs", "refused", "fault");
    if (kind) row.classList.add(kind);
    find("[data-verdict]", row).replaceChildren(...(text ? [icon(sign), text] : []));
  }

  function draw(state) {
    for (const [attack, row] of rows) {
      const proof = proofs.get(attack);
      if (state.running?.attack === attack) mark(row, "runs", "play", `${state.running.step} …`);
      else if (state.waiting.includes(attack)) mark(row, "waits", "half", "waits");
      else if (!proof) mark(row);
      else if (proof.fault) mark(row, "fault", "cross", "not proved");
      else mark(row, "refused", "check", `refused: ${proof.reason}`);
    }
    const faults = [...proofs.values()].filter((proof) => proof.fault).length;
    const left = state.waiting.length + (state.running ? 1 : 0);
    progress.textContent = sentence(
      `${proofs.size} of ${rows.size} attacked since this stack was started` +
        (faults ? `, ${faults} not proved` : proofs.size ? ", all refused" : "") +
        (left ? `; ${left} to go.` : "."),
    );
  }

  let first = true;

  function take(state) {
    const steps = [];
    for (const [attack, proof] of Object.entries(state.proofs)) {
      const row = rows.get(attack);
      if (!row) continue; // of a newer lab than this page
      proofs.set(attack, proof);
      const details = find("details", row);
      details.hidden = false;
      fill(find("[data-own]", details), row, proof);
      if (!first) steps.push({ row, step: "done", proof });
    }
    const running = state.running && rows.get(state.running.attack);
    if (running) steps.push({ row: running, step: state.running.step, proof: state.running.proof });
    first = false;
    draw(state);
    play(steps.filter((each) => each.step !== "done" || each.proof));
  }

  // --- pressing -----------------------------------------------------------------------------------------

  function say(text) {
    caption.textContent = text;
  }

  for (const form of all("form[data-press]")) {
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const button = event.submitter;
      const fields = new URLSearchParams(new FormData(form, button));
      const address = button?.getAttribute("formaction") ?? form.getAttribute("action");
      try {
        const answer = await fetch(address, { method: "POST", body: fields, headers: { Accept: "application/json" } });
        if (answer.status === 403) say("This page is older than the frontend that answers: reload it.");
        else if (!answer.ok) say((await answer.json()).title ?? "The lab did not take it.");
      } catch {
        say("The frontend does not answer. Nothing was started.");
      }
      lab.scrollIntoView({ block: "nearest", behavior: still.matches ? "auto" : "smooth" });
    });
  }

  // --- listening ----------------------------------------------------------------------------------------

  function listen() {
    const events = new EventSource("/lab/events");
    events.addEventListener("message", (event) => {
      lab.classList.remove("cut-off");
      take(JSON.parse(event.data));
    });
    events.addEventListener("error", () => {
      lab.classList.add("cut-off");
      progress.textContent = "The lab does not answer; asking again.";
      if (events.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
      setTimeout(listen, 3000);
    });
  }

  // The first state is drawn at once, without a performance of what was seen before.
  listen();
})();
