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
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const found = await answer.json();
    show(found.html);
    isDone = found.is_done;
  }
}

// The link that the keyboard is at keeps the focus where it is still there.
function show(html) {
  const focused = panel.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  panel.innerHTML = html;
  if (focused === null) return;
  const links = [...panel.querySelectorAll("a")];
  links.find((link) => link.getAttribute("href") === focused)?.focus({ preventScroll: true });
}

goOn().catch((error) => {
  const message = document.createElement("p");
  message.className = "problem";
  message.setAttribute("role", "alert");
  message.textContent = `The comparison stopped (${error.message}); load the page again to go on`;
  panel.prepend(message);
});
