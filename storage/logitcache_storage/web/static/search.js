"use strict";

// A search that has found nothing yet goes on by itself, a part of the corpus at a time, until it finds something,
// comes to the end, or is stopped.
const further = document.querySelector("#further a[data-goes-on]");

async function goOn(address) {
  const stop = document.createElement("button");
  stop.type = "button";
  stop.textContent = "Stop";
  further.replaceWith(stop);
  let stopped = false;
  stop.addEventListener("click", () => (stopped = true));
  while (!stopped) {
    const answer = await fetch(address).catch(() => null);
    if (!answer?.ok) break;
    const found = new DOMParser().parseFromString(await answer.text(), "text/html");
    const next = found.querySelector("#further a[data-goes-on]");
    if (!next) break;
    document.getElementById("found").textContent = found.getElementById("found").textContent;
    address = next.href;
  }
  location.replace(address);
}

if (further) goOn(further.href);
