"use strict";

// The token has done its work once the cookie is set; it need not stay in the address bar and the history.
const address = new URL(location.href);
if (address.searchParams.has("token")) {
  address.searchParams.delete("token");
  history.replaceState(null, "", address);
}

// Whoever steps to another page with the keyboard finds there in focus what they stepped with.
document.addEventListener("click", (event) => {
  const step = event.target.closest("a[rel]");
  if (step && event.detail === 0) sessionStorage.setItem("focus", `a[rel="${step.rel}"]`);
});
const focused = sessionStorage.getItem("focus");
sessionStorage.removeItem("focus");
if (focused) document.querySelector(focused)?.focus({ preventScroll: true });

// A slider says its value.
for (const slider of document.querySelectorAll("input[data-shows]")) {
  const output = document.getElementById(slider.dataset.shows);
  slider.addEventListener("input", () => (output.textContent = slider.value));
}

// What goes on in the background is asked for until it is done; then the page is worth another look.
const POLL_MS = 2000;
for (const place of document.querySelectorAll("[data-poll]")) {
  const timer = setInterval(async () => {
    if (document.hidden) return;
    const answer = await fetch(place.dataset.poll).catch(() => null);
    if (!answer?.ok) return;
    place.innerHTML = await answer.text();
    if (!place.querySelector("[data-done]")) return;
    clearInterval(timer);
    if (place.contains(document.activeElement) || document.activeElement === document.body) location.reload();
  }, POLL_MS);
}
