"use strict";

// A search that has found nothing yet goes on by itself, a part of the corpus at a time, until it finds something,
// comes to the end, or is stopped.
const further = document.querySelector("#further a[data-goes-on]");

async function read(address, signal) {
  const answer = await fetch(address, { signal });
  return answer.text();
}

async function goOn() {
  const stop = document.createElement("button");
  stop.type = "button";
  stop.textContent = "Stop";
  further.replaceWith(stop);
  const asking = new AbortController();
  stop.addEventListener("click", () => asking.abort());
  for (;;) {
    const page = await read(further.href, asking.signal).catch(() => null);
    if (page === null) break; // stopped, or the server is gone
    const found = new DOMParser().parseFromString(page, "text/html");
    const next = found.querySelector("#further a[data-goes-on]");
    if (!next) {
      location.replace(further.href); // something to see: what was found, the end, or an error
      return;
    }
    document.getElementById("found").textContent = found.getElementById("found").textContent;
    further.href = next.getAttribute("href");
  }
  stop.replaceWith(further);
  further.focus();
}

if (further) goOn();
