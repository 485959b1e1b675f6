"use strict";

// The text of a sample is one stop of the Tab key; within it, arrow keys move. Hovering shows a position for as long
// as the pointer stays, choosing one (click or keys) puts it into the address.
const text = document.getElementById("text");
const panel = document.getElementById("position");
const tokens = [...text.querySelectorAll("a.tok")];
const start = Number(text.dataset.start); // tokens count from here
const fragments = new Map(); // by target row, newest last
const KEPT = 200;
const HOVER_MS = 60;
let chosen = tokens.findIndex((token) => token.getAttribute("aria-current") === "true");
let shown = chosen >= 0 ? rowOf(tokens[chosen]) : null;
let wanted = shown;
let timer = 0;
let request = null;

// A link to a position leads to its token; on a narrow screen the panel then stays in sight.
if (chosen >= 0 && new URLSearchParams(location.search).has("row")) {
  panel.classList.add("follows");
  tokens[chosen].scrollIntoView({ block: "center" });
}

// With one of these keys it is the browser that is meant: Alt and an arrow go back in its history.
function isPlain(event) {
  return !(event.altKey || event.ctrlKey || event.metaKey || event.shiftKey);
}

function rowOf(token) {
  return start + Number(token.dataset.row);
}

async function fragment(row) {
  if (!fragments.has(row)) {
    request?.abort();
    request = new AbortController();
    const answer = await fetch(`/samples/${text.dataset.name}/positions/${row}`, { signal: request.signal });
    const body = await answer.text();
    if (!answer.ok) {
      const problem = new DOMParser().parseFromString(body, "text/html").querySelector(".problem");
      throw new Error(problem ? problem.textContent : body);
    }
    fragments.set(row, body);
    if (fragments.size > KEPT) fragments.delete(fragments.keys().next().value);
  }
  return fragments.get(row);
}

async function show(row) {
  wanted = row;
  if (row === shown) return;
  try {
    const body = await fragment(row);
    if (wanted !== row) return;
    const open = panel.querySelector("details")?.open;
    panel.innerHTML = body;
    if (open && panel.querySelector("details")) panel.querySelector("details").open = true;
    shown = row;
  } catch (error) {
    if (error.name === "AbortError" || wanted !== row) return;
    const message = document.createElement("p");
    message.className = "problem";
    message.textContent = error.message;
    panel.replaceChildren(message);
    shown = null;
  }
}

function choose(index) {
  const before = tokens[chosen];
  if (before) {
    before.removeAttribute("aria-current");
    before.classList.remove("selected");
    before.tabIndex = -1;
  }
  chosen = index;
  const token = tokens[chosen];
  token.setAttribute("aria-current", "true");
  token.classList.add("selected");
  token.tabIndex = 0;
  token.focus({ preventScroll: true });
  token.scrollIntoView({ block: "nearest" });
  clearTimeout(timer);
  panel.classList.add("follows");
  show(rowOf(token));
  history.replaceState(null, "", `?shade=${text.dataset.shade}&row=${rowOf(token)}`);
  document.dispatchEvent(new CustomEvent("position", { detail: { row: rowOf(token) } }));
}

// The token above or below: on the next line that has one, the nearest to where this one stands.
function neighbour(index, step) {
  const here = tokens[index].getClientRects()[0];
  let line = null;
  let best = -1;
  let least = Infinity;
  for (let i = index + step; i >= 0 && i < tokens.length; i += step) {
    const box = tokens[i].getClientRects()[0];
    if (Math.abs(box.top - here.top) < box.height / 2) continue;
    if (line === null) line = box.top;
    if (Math.abs(box.top - line) > box.height / 2) break;
    const distance = Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
    if (distance < least) [least, best] = [distance, i];
  }
  return best;
}

text.addEventListener("keydown", (event) => {
  const index = tokens.indexOf(event.target.closest("a.tok"));
  if (index < 0 || !isPlain(event)) return;
  const next = {
    ArrowRight: () => index + 1,
    ArrowLeft: () => index - 1,
    ArrowDown: () => neighbour(index, 1),
    ArrowUp: () => neighbour(index, -1),
    Home: () => 0,
    End: () => tokens.length - 1,
  }[event.key]?.();
  if (next === undefined) return;
  event.preventDefault();
  if (next >= 0 && next < tokens.length) choose(next);
  else document.querySelector(`[data-edge="${event.key}"]`)?.click(); // a long sample goes on, on another page
});

text.addEventListener("click", (event) => {
  const index = tokens.indexOf(event.target.closest("a.tok"));
  if (index < 0 || !isPlain(event)) return;
  event.preventDefault();
  choose(index);
});

text.addEventListener("mouseover", (event) => {
  const token = event.target.closest("a.tok");
  clearTimeout(timer);
  if (token) timer = setTimeout(() => show(rowOf(token)), HOVER_MS);
});

text.addEventListener("mouseleave", () => {
  clearTimeout(timer);
  if (chosen >= 0) show(rowOf(tokens[chosen]));
});

// Arrow keys work from anywhere on the page that has no use for them.
document.addEventListener("keydown", (event) => {
  if (!isPlain(event) || !event.target.matches("body, main, a.button") || chosen < 0) return;
  if (!["ArrowRight", "ArrowLeft"].includes(event.key)) return;
  event.preventDefault();
  choose(Math.min(tokens.length - 1, Math.max(0, chosen + (event.key === "ArrowRight" ? 1 : -1))));
});
