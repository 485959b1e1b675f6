"use strict";

// The server compares while it is asked to: go on until all is compared, as long as somebody looks.
const panel = document.getElementById("comparison");

async function goOn() {
  for (let isDone = false; !isDone; ) {
    if (document.hidden) {
      await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
      continue;
    }
    const answer = await fetch("/comparison/further");
    if (!answer.ok) return;
    const found = await answer.json();
    panel.innerHTML = found.html;
    isDone = found.is_done;
  }
}

goOn();
