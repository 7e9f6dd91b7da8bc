/** The chat and the plain prompt: questions to the server, answers as they come. */

import { CallError, callJson, streamEvents } from "./api.js";
import { cell } from "./figures.js";
import { count, number } from "./words.js";

const byId = (id) => document.getElementById(id);

/** What was said so far, as the server wants it, without the system prompt. */
let messages = [];

/** One box that asks and shows an answer: what stops it, what tells about it. At most one answer at a time. */
class Asker {
  constructor(name, onLocked) {
    this.send = byId(`${name}-form`).querySelector("button.main");
    this.stopButton = byId(`${name}-stop`);
    this.status = byId(`${name}-status`);
    this.onLocked = onLocked;
    this.stopper = null;
    this.stopButton.addEventListener("click", () => this.stop());
  }

  get busy() {
    return this.stopper !== null;
  }

  stop() {
    this.stopper?.abort();
  }

  /** Stream an answer into an element. Returns its text, and whether it came without an error. */
  async ask(path, body, target) {
    this.stopper = new AbortController();
    this.mark(true, target);
    this.say("Waiting for the answer.");
    const answer = { text: "", ok: true };
    try {
      await this.read(streamEvents(path, body, this.stopper.signal), answer, target);
    } catch (error) {
      this.explain(error, answer);
    }
    this.stopper = null;
    this.mark(false, target);
    return answer;
  }

  async read(events, answer, target) {
    const began = performance.now();
    let [first, pieces, usage, reason] = [0, 0, null, null];
    for await (const event of events) {
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      reason = choice?.finish_reason ?? reason;
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      if (!piece) continue;
      if (!first) {
        first = performance.now();
        this.say("Answering.");
      }
      pieces += 1;
      answer.text += piece;
      append(target, piece);
    }
    this.say(describeAnswer(usage?.completion_tokens ?? pieces, performance.now() - (first || began), reason));
  }

  explain(error, answer) {
    if (error.name === "AbortError") {
      this.say("Stopped.");
      return;
    }
    answer.ok = false;
    this.say(error.message, true);
    if (error instanceof CallError && error.status === 401) this.onLocked();
  }

  mark(busy, target) {
    target.setAttribute("aria-busy", String(busy));
    this.send.disabled = busy;
    this.stopButton.disabled = !busy;
  }

  say(words, wrong = false) {
    this.status.textContent = words;
    this.status.classList.toggle("wrong", wrong);
  }
}

function describeAnswer(tokens, milliseconds, reason) {
  const rate = milliseconds > 0 && tokens > 1 ? `, ${number((tokens - 1) / (milliseconds / 1000))} a second` : "";
  const cut = reason === "length" ? "; cut off at the most tokens allowed" : "";
  return `${count(tokens, "token")}${rate}${cut}.`;
}

/** Add text at an element's end; keep the end of the log in sight if it was. */
function append(target, words) {
  const log = target.closest(".log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  target.append(words);
  target.normalize();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function readSettings() {
  const most = byId("max-tokens");
  const temperature = byId("temperature");
  for (const field of [most, temperature]) {
    if (!field.reportValidity() || field.value === "") return null;
  }
  return {
    model: byId("model").value,
    temperature: temperature.valueAsNumber,
    max_tokens: most.valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
}

function addMessage(who, text) {
  const article = document.createElement("article");
  article.className = who;
  const body = cell("p", text);
  article.append(cell("h3", who === "user" ? "You" : "Model"), body);
  const log = byId("log");
  log.append(article);
  log.scrollTop = log.scrollHeight;
  return { article, body };
}

async function chat(asker) {
  const box = byId("message");
  const question = box.value.trim();
  const settings = readSettings();
  if (asker.busy || !question || !settings) return;
  const system = byId("system").value.trim();
  const said = messages;
  const asked = [...said, { role: "user", content: question }];
  const sent = system ? [{ role: "system", content: system }, ...asked] : asked;
  const mine = addMessage("user", question);
  const reply = addMessage("assistant", "");
  box.value = "";
  const answer = await asker.ask("/v1/chat/completions", { ...settings, messages: sent }, reply.body);
  if (messages !== said) return;
  if (answer.text) {
    messages = [...asked, { role: "assistant", content: answer.text }];
    return;
  }
  // Nothing was answered: the question goes back where it can be changed or sent again.
  reply.article.remove();
  mine.article.remove();
  if (!box.value) box.value = question;
}

async function complete(asker) {
  const prompt = byId("prompt").value;
  const settings = readSettings();
  if (asker.busy || !prompt || !settings) return;
  const target = byId("completion");
  target.replaceChildren();
  await asker.ask("/v1/completions", { ...settings, prompt }, target);
}

/** Fill the selector with the server's models; what was chosen stays chosen. */
export async function loadModels() {
  const { data } = await callJson("/v1/models");
  const select = byId("model");
  const chosen = select.value;
  const options = data.map(({ id }) => Object.assign(cell("option", id), { value: id }));
  select.replaceChildren(...options);
  if (data.some(({ id }) => id === chosen)) select.value = chosen;
}

/** Make the boxes work. `onLocked` is called when the server wants a key. */
export function startTalk(onLocked) {
  const chatter = new Asker("chat", onLocked);
  const completer = new Asker("prompt", onLocked);
  onSubmit("chat-form", "message", () => chat(chatter), () => chatter.stop(), true);
  onSubmit("prompt-form", "prompt", () => complete(completer), () => completer.stop(), false);
  byId("clear").addEventListener("click", () => {
    chatter.stop();
    messages = [];
    byId("log").replaceChildren();
    chatter.say("The conversation is cleared.");
    byId("message").focus();
  });
  startTabs(["chat", "prompt"]);
}

/** Send by the button and by Enter (Control and Enter where Enter begins a line); Escape stops. */
function onSubmit(form, box, send, stop, enterSends) {
  byId(form).addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId(box).addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    if (!enterSends && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    send();
  });
}

/** Tabs as the ARIA practices have them: one of them in the order of Tab, arrows between them. */
function startTabs(names) {
  const tabs = names.map((name) => byId(`${name}-tab`));
  const choose = (place) => {
    tabs.forEach((tab, index) => {
      tab.setAttribute("aria-selected", String(index === place));
      tab.tabIndex = index === place ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = index !== place;
    });
  };
  tabs.forEach((tab, place) => {
    tab.addEventListener("click", () => choose(place));
    tab.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: tabs.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const next = (moves[event.key] + tabs.length) % tabs.length;
      choose(next);
      tabs[next].focus();
    });
  });
}
