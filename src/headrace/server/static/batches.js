/** The table of batches, changed in place so that the keyboard's focus stays, and cancelling one. */

import { callJson } from "./api.js";
import { cell, describeProgress, say } from "./figures.js";
import { duration } from "./words.js";

const OVER = new Set(["completed", "failed", "expired", "cancelled", "cancelling"]);

const byId = (id) => document.getElementById(id);
const lines = new Map();
let asked = null;

/** Bring the table up to date with the `batches` of /stats. */
export function showBatches(batches) {
  byId("batches").hidden = batches.length === 0;
  byId("no-batches").hidden = batches.length > 0;
  const present = new Set(batches.map((batch) => batch.id));
  for (const [id, line] of lines) {
    if (present.has(id)) continue;
    line.row.remove();
    lines.delete(id);
  }
  for (const batch of batches) {
    if (!lines.has(batch.id)) lines.set(batch.id, addLine(batch.id));
    fillLine(lines.get(batch.id), batch);
  }
}

function addLine(id) {
  const row = byId("batch-rows").insertRow();
  const head = document.createElement("th");
  head.scope = "row";
  head.append(cell("code", id));
  const status = cell("span", "");
  status.className = "quiet";
  head.append(status);
  row.append(head);
  const progress = document.createElement("progress");
  progress.setAttribute("aria-label", `Progress of ${id}`);
  const counts = cell("span", "");
  counts.className = "quiet";
  row.insertCell().append(progress, counts);
  const left = row.insertCell();
  const button = cell("button", "Cancel");
  button.type = "button";
  button.setAttribute("aria-label", `Cancel ${id}`);
  button.addEventListener("click", () => ask(id));
  row.insertCell().append(button);
  return { row, status, progress, counts, left, button };
}

function fillLine(line, batch) {
  line.status.textContent = batch.status.replaceAll("_", " ");
  line.progress.max = Math.max(batch.total, 1);
  line.progress.value = batch.completed + batch.failed;
  line.counts.textContent = describeProgress(batch);
  const over = OVER.has(batch.status);
  line.left.textContent = batch.seconds_left === null ? (over ? "" : "not known") : duration(batch.seconds_left);
  line.button.hidden = over;
}

function ask(id) {
  asked = id;
  byId("cancel-name").textContent = id;
  byId("cancel-dialog").returnValue = "";
  byId("cancel-dialog").showModal();
}

byId("cancel-dialog").addEventListener("close", async (event) => {
  if (event.target.returnValue !== "cancel") return;
  const id = asked;
  say("batch-status", `Cancelling ${id}.`);
  try {
    await callJson(`/v1/batches/${encodeURIComponent(id)}/cancel`, { method: "POST" });
    say("batch-status", `${id} is being cancelled.`);
  } catch (error) {
    say("batch-status", `${id} was not cancelled: ${error.message}`);
  }
});
