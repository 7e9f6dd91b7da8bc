/** The page's clockwork: asks for the figures once a second while the page is seen, and for a key where one is needed. */

import { callJson, forgetKey, hasKey, keepKey } from "./api.js";
import { showBatches } from "./batches.js";
import { redraw, say, showFigures } from "./figures.js";
import { loadModels, startTalk } from "./talk.js";

const SECOND = 1000;
const PATIENCE = 10 * SECOND;

const byId = (id) => document.getElementById(id);
const KEY_WORDS = byId("key-words").textContent;
let timer = null;
let polling = false;
let locked = false;
let known = "";

async function poll() {
  if (polling || locked || document.hidden) return;
  polling = true;
  clearTimeout(timer);
  try {
    const stats = await callJson("/stats", { signal: AbortSignal.timeout(PATIENCE) });
    showFigures(stats);
    showBatches(stats.batches);
    const loaded = stats.models.every((model) => model.loaded);
    showHealth("good", loaded ? "Ready" : "Ready; some models are not loaded");
    await followModels(stats.models);
  } catch (error) {
    if (error.status === 401) lock();
    else showHealth("bad", error.message);
  }
  polling = false;
  timer = setTimeout(poll, SECOND);
}

/** Load the selector again when the server has other models. */
async function followModels(models) {
  const names = models.map((model) => model.name).join("\n");
  if (names === known) return;
  await loadModels();
  known = names;
}

function showHealth(state, words) {
  byId("lamp").className = `lamp ${state}`;
  say("health", words);
}

/** The server wants a key: stop asking for figures until there is one. */
function lock() {
  say("key-words", hasKey() ? "The server does not know this key. Try another." : KEY_WORDS);
  forgetKey();
  locked = true;
  showHealth("bad", "A key is needed");
  byId("unlock").hidden = false;
  openKeyDialog();
}

function openKeyDialog() {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  dialog.returnValue = "";
  dialog.showModal();
}

byId("unlock").addEventListener("click", openKeyDialog);
byId("key-dialog").addEventListener("close", (event) => {
  const text = byId("key").value.trim();
  byId("key").value = "";
  if (event.target.returnValue !== "use" || !text) return;
  keepKey(text);
  locked = false;
  byId("unlock").hidden = true;
  showHealth("", "Connecting");
  poll();
});
document.addEventListener("visibilitychange", poll);
new ResizeObserver(redraw).observe(byId("rates"));
startTalk(lock);
poll();
