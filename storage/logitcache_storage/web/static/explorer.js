"use strict";

// Sliders ask the server what follows from them, one question at a time: the last one asked for is always answered.
const form = document.getElementById("explorer");
const panel = document.getElementById("target");
const said = document.getElementById("said"); // for screen readers: the sentence above the table, not all of its numbers
let isAsking = false;
let isStale = false;

function parameters() {
  return new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== ""));
}

function say(problem) {
  const message = document.createElement("p");
  message.className = "problem";
  message.setAttribute("role", "alert");
  message.textContent = problem;
  panel.replaceChildren(message);
}

async function update() {
  isStale = true;
  if (isAsking) return;
  isAsking = true;
  while (isStale) {
    isStale = false;
    const asked = parameters();
    try {
      const answer = await fetch(`/explorer/target?${asked}`);
      const found = await answer.json();
      if (found.problem !== undefined) say(found.problem);
      else {
        panel.innerHTML = found.table;
        said.textContent = panel.querySelector("caption").textContent;
      }
      history.replaceState(null, "", `/explorer?${asked}`);
    } catch (error) {
      say(`The server does not answer (${error.message}); is 'logitcache serve' still running?`);
    }
  }
  isAsking = false;
}

for (const slider of form.querySelectorAll("input[type=range]")) {
  const number = document.getElementById(slider.dataset.for);
  slider.hidden = false;
  slider.addEventListener("input", () => {
    number.value = String(Number(Number(slider.value).toPrecision(4)));
    update();
  });
  number.addEventListener("input", () => {
    if (number.value !== "" && number.checkValidity()) slider.value = number.value;
    update();
  });
}

// Another objective has other parameters, another position another text: a page of its own.
form.addEventListener("change", (event) => {
  if (!event.target.matches("select, [name=sample], [name=row]")) return;
  sessionStorage.setItem("focus", `[name="${event.target.name}"]`); // as page.js does
  location.assign(`/explorer?${parameters()}`);
});

// Steps along the text keep everything else that was chosen.
for (const step of form.querySelectorAll("a[data-step]")) {
  step.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const kept = parameters();
    kept.set("row", new URL(step.href).searchParams.get("row"));
    location.assign(`/explorer?${kept}`);
  });
}
