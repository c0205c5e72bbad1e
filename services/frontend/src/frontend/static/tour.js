// The tour by keyboard, one step at a time. Without this file all steps are on the page, one after the other.
"use strict";

(() => {
  const tour = document.querySelector("[data-tour]");
  if (!tour) return;
  const steps = [...tour.querySelectorAll(".tour-step")];
  const links = [...tour.querySelectorAll(".tour-steps a")];
  let at = 0;

  function show(number, focus) {
    at = Math.min(steps.length - 1, Math.max(0, number));
    steps.forEach((step, index) => (step.hidden = index !== at));
    links.forEach((link, index) => (index === at ? link.setAttribute("aria-current", "step") : link.removeAttribute("aria-current")));
    if (focus) steps[at].focus({ preventScroll: true });
  }

  const asked = () => steps.findIndex((step) => `#${step.id}` === location.hash);

  function go(number) {
    const to = Math.min(steps.length - 1, Math.max(0, number));
    if (to === at) return;
    show(to, true); // at once: the browser tells of a new hash later, and a key may be pressed again until then
    location.hash = steps[to].id;
  }

  addEventListener("hashchange", () => asked() >= 0 && show(asked(), true));
  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const number = Number(event.key);
    if (event.key === "ArrowRight" || event.key === "PageDown") go(at + 1);
    else if (event.key === "ArrowLeft" || event.key === "PageUp") go(at - 1);
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(steps.length - 1);
    else if (number >= 1 && number <= steps.length) go(number - 1);
    else if (event.key === "Enter" && !event.target.closest("a, button")) steps[at].querySelector("[data-open]")?.click();
    else return;
    event.preventDefault();
  });

  tour.classList.add("stepwise");
  show(Math.max(0, asked()), false);
})();
