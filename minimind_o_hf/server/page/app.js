// The page: what is typed, said and shown goes to the server, its answers to the screen and the loudspeaker.

import { Microphone, Player, RATE, deviceProblem, fromBase64, join, toBase64 } from "./audio.js";
import { Phone } from "./phone.js";
import { Camera, readPicture } from "./pictures.js";
import { Realtime } from "./realtime.js";
import { showTexts, switchLanguage, t } from "./texts.js";
import { Voices } from "./voices.js";

const KEY = "minimind-o-key"; // in sessionStorage
const MOST_ENTRIES = 200; // on the screen
const HOLD_MS = 350; // a button held for less was pressed, not held
const LEAST_SPEECH = 0.3; // s
const MOST_SPEECH = 55; // s; then it is sent, since the server takes 60
const KEEP_OPEN_MS = 20000; // the microphone stays open so long between two turns, since opening it takes a moment
const SILENT_SECONDS = 3; // a microphone that gives nothing at all for so long is muted somewhere
const VAD = { type: "server_vad" };
// Names of events, by which an error tells what it is about.
const ASK = "ask";
const CUT = "cut";

const $ = (id) => document.getElementById(id);
const connection = new Realtime();
const player = new Player();
const camera = new Camera($("camera-dialog"));

let session = null; // the server's description of it
let voice = ""; // the chosen one
let handsFree = false;
let muted = false; // the microphone, in a call
let picture = ""; // a data URL
let connectionState = "connecting";
let entries = new Map(); // item -> what is on the screen
let speech = new Map(); // item -> milliseconds of the person's speech
let response = null; // the answer that is being made: {id, item, cancelled}
let dropped = new Set(); // items that were interrupted: no more sound of them is played
let turnEnd = 0; // when the person was done; for the latency
let waitingForSound = false;
let sentMs = 0; // sound given to the server in this connection
let count = { errors: 0, sent: 0, interruptions: 0, latency: null, heard: null };

// ---------------------------------------------------------------- what is wrong

/** Says something above the message box: `name` of a text, or "" to take the notices of a group away. */
function notice(name, values = {}, { group = name, button = "dismiss", action = null, calm = false } = {}) {
  document.querySelector(`#notices [data-group=${group}]`)?.remove();
  if (!name) return;
  const row = document.createElement("div");
  row.dataset.group = group;
  row.classList.toggle("calm", calm);
  const text = document.createElement("span");
  text.textContent = t(name, values);
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = t(button);
  close.addEventListener("click", () => {
    row.remove();
    action?.();
    $("text").focus();
  });
  row.append(text, close);
  $("notices").append(row);
}

function deviceNotice(error, device) {
  const name = deviceProblem(error, device);
  notice(name, {}, { group: "device" });
  phone.problem(t(name));
}

// ---------------------------------------------------------------- the conversation on the screen

/** A turn on the screen; `finish` with what is to be said of it. */
class Entry {
  constructor(role, { text = "", image = "", spoken = null } = {}) {
    this.element = document.createElement("li");
    this.element.className = role;
    const who = document.createElement("span");
    who.className = "unseen";
    who.textContent = `${t(role === "user" ? "you" : "answer")}: `;
    this.element.append(who);
    if (image) {
      const shown = document.createElement("img");
      shown.src = image;
      shown.alt = t("attachedPicture");
      this.element.append(shown);
    }
    this.text = document.createElement("p");
    if (spoken !== null) {
      this.text.className = "spoken";
      text = t("spoken", { seconds: (spoken / 1000).toFixed(1) });
    }
    this.text.textContent = text;
    this.element.append(this.text);
    this.notes = [];
    show(this.element);
  }

  say(text) {
    const follow = atEnd();
    this.text.textContent = text;
    if (follow) scrollToEnd();
  }

  /** What was heard of it stays; the rest, which the model forgets, is dimmed. */
  keep(heard) {
    const text = this.text.textContent;
    if (!text.startsWith(heard)) return;
    heard += text.slice(heard.length).match(/^\s*/)[0];
    const rest = document.createElement("span");
    rest.className = "unheard";
    rest.textContent = text.slice(heard.length);
    this.text.replaceChildren(heard, rest);
  }

  note(name, values) {
    if (!this.meta) {
      this.meta = document.createElement("p");
      this.meta.className = "meta";
      this.element.append(this.meta);
    }
    this.notes.push(t(name, values));
    const follow = atEnd();
    this.meta.textContent = this.notes.join(" · ");
    if (follow) scrollToEnd();
  }
}

const scroller = document.querySelector("main");
const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
const scrollToEnd = () => (scroller.scrollTop = scroller.scrollHeight);

function show(element) {
  $("welcome").hidden = true;
  $("log").append(element);
  while ($("log").children.length > MOST_ENTRIES) $("log").firstChild.remove();
  scrollToEnd();
}

function showBreak() {
  const last = $("log").lastElementChild;
  if (!last || last.className === "break") return;
  const line = document.createElement("li");
  line.className = "break";
  line.textContent = t("newConnection");
  show(line);
}

// ---------------------------------------------------------------- the connection

function showConnection() {
  $("connection").dataset.state = connectionState;
  $("connection").textContent = t(connectionState);
}

connection.addEventListener("state", ({ detail }) => {
  const { state, problem, reason } = detail;
  connectionState = state;
  showConnection();
  if (state === "connecting") return;
  notice("", {}, { group: "connection" });
  if (state === "online") return notice("", {}, { group: "kept" });
  if (response) {
    entries.get(response.item)?.note("stopped");
    endAnswer();
  }
  if (talking) discardTalk();
  entries = new Map();
  session = null;
  phone.heard = "";
  if (state === "waiting") {
    notice(problem, {}, { group: "connection", button: "retryNow", action: () => connection.connect() });
  } else if (state === "locked") {
    askKey(problem);
  } else if (state === "ended") {
    setHandsFree(false);
    phone.close();
    const name = reason ? "endedWhy" : "endedText";
    notice(name, { reason }, { group: "connection", button: "connect", action: () => connection.connect() });
  }
  phone.problem(state === "waiting" ? t(problem) : "");
});

connection.addEventListener("models", ({ detail: models }) => {
  $("model").replaceChildren(...models.map((id) => new Option(id, id, false, id === connection.model)));
  $("model").disabled = models.length < 2;
});

function askKey(problem) {
  $("key-problem").textContent = t(problem);
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key-dialog").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  $("key-dialog").close();
  connection.connect();
});

function setKey(key) {
  connection.key = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Storage is switched off: the key holds until the page is loaded again.
  }
}

/** The key that was kept, or that the address brought (`#key=...`, of a QR code), which is then taken out of it. */
function readKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    history.replaceState(null, "", location.pathname + location.search);
    return setKey(given);
  }
  try {
    connection.key = sessionStorage.getItem(KEY) ?? "";
  } catch {
    connection.key = "";
  }
}

/** True where something can be sent; otherwise says why not. */
function online() {
  if (connection.state === "online" && session) return true;
  if (connection.state === "locked") askKey("missingKey");
  else if (connection.state === "ended") connection.connect();
  if (connection.state !== "locked") notice("keptText", {}, { group: "kept", calm: true });
  return false;
}

const update = (session) => connection.send({ type: "session.update", session: { type: "realtime", ...session } });

/** Tells the server who decides when the person is done; its clock of what it hears then starts at 0. */
function updateTurns() {
  sentMs = 0;
  const vad = { ...VAD, ...session.vad, create_response: true, interrupt_response: true };
  update({ audio: { input: { turn_detection: handsFree ? vad : null } } });
}

const updateVoice = () => voice && update({ audio: { output: { voice } } });

// ---------------------------------------------------------------- what the server sends

const handlers = {
  "session.created"({ session: created }) {
    session = { vad: created.audio?.input?.turn_detection ?? {}, voice: created.audio?.output?.voice ?? "" };
    showBreak();
    entries = new Map();
    speech = new Map();
    dropped = new Set();
    response = null;
    updateTurns();
    updateVoice();
    if (!Player.possible) update({ output_modalities: ["text"] });
    $("examples").hidden = created.model !== "nano";
    voices.load();
    showState();
  },

  "input_audio_buffer.speech_started"({ item_id, audio_start_ms }) {
    speech.set(item_id, -audio_start_ms);
    phone.heard = "hearing";
    interrupt(false);
    showState();
  },

  "input_audio_buffer.speech_stopped"({ item_id, audio_end_ms }) {
    speech.set(item_id, (speech.get(item_id) ?? -audio_end_ms) + audio_end_ms);
    turnEnded(Math.max(0, sentMs - audio_end_ms));
    phone.heard = "thinking";
    showState();
  },

  "input_audio_buffer.committed"({ item_id }) {
    if (!handsFree) return; // it is on the screen already
    new Entry("user", { spoken: Math.max(0, speech.get(item_id) ?? 0) });
    speech.delete(item_id);
    phone.caption("", true);
  },

  "response.created"({ response: { id } }) {
    const cancelled = response?.cancelled ?? false;
    response = { id, item: null, cancelled };
    if (phone.heard === "thinking") phone.heard = "";
    if (cancelled) connection.send({ type: "response.cancel", event_id: CUT });
    showState();
  },

  "response.output_item.added"({ item: { id } }) {
    if (!response) return;
    response.item = id;
    if (response.cancelled) dropped.add(id);
    const entry = new Entry("assistant");
    entry.element.classList.add("making");
    entries.set(id, entry);
  },

  "response.output_audio_transcript.delta": ({ item_id, delta }) => addText(item_id, delta),
  "response.output_text.delta": ({ item_id, delta }) => addText(item_id, delta),
  "response.output_audio_transcript.done": ({ item_id, transcript }) => wholeText(item_id, transcript),
  "response.output_text.done": ({ item_id, text }) => wholeText(item_id, text),

  "response.output_audio.delta"({ item_id, delta }) {
    if (dropped.has(item_id) || !Player.possible) return;
    player.push(item_id, fromBase64(delta));
    if (player.suspended) notice("tapForSound", {}, { calm: true });
  },

  "response.output_audio.done": ({ item_id }) => player.end(item_id),

  "response.done"({ response: { status, status_details: details } }) {
    const entry = entries.get(response?.item);
    if (status === "failed") {
      notice("failed", { message: details?.error?.message ?? "" });
    } else if (status === "incomplete") {
      entry?.note("limit");
    } else if (status === "cancelled" && entry && !dropped.has(response.item)) {
      interrupt(false);
    }
    endAnswer();
  },

  "conversation.item.truncated": ({ item_id }) => connection.send({ type: "conversation.item.retrieve", item_id }),

  "conversation.item.retrieved"({ item }) {
    entries.get(item.id)?.keep(item.content?.[0]?.transcript ?? "");
  },

  error({ error }) {
    // An answer may have ended, or not begun, before the server was told to end or cut it.
    if (error.event_id === CUT || error.code === "session_expired" || error.code === "server_busy") return;
    count.errors++;
    phone.heard = "";
    if (error.event_id === ASK) {
      endAnswer();
      if (error.code === "nothing_to_answer") return; // what was wrong with the message was said
    }
    notice("serverSays", { message: error.message });
    showState();
  },
};

connection.addEventListener("event", ({ detail: event }) => handlers[event.type]?.(event));

function addText(item, delta) {
  const entry = entries.get(item);
  if (!entry || dropped.has(item)) return;
  entry.say(entry.text.textContent + delta);
  phone.caption(entry.text.textContent);
}

function wholeText(item, text) {
  if (dropped.has(item)) return;
  entries.get(item)?.say(text);
  phone.caption(text);
  $("announcer").textContent = `${t("answer")}: ${text}`;
}

function endAnswer() {
  const item = response?.item;
  entries.get(item)?.element.classList.remove("making");
  if (item) player.end(item);
  response = null;
  for (const done of waiters.splice(0)) done();
  showState();
}

let waiters = [];

/** Resolves when no answer is being made any more, or when that takes too long. */
function answered() {
  return response ? new Promise((resolve) => (waiters.push(resolve), setTimeout(resolve, 3000))) : Promise.resolve();
}

// ---------------------------------------------------------------- turns

/** The person was done `ago` milliseconds ago: from here on the first sound is waited for. */
function turnEnded(ago = 0) {
  turnEnd = performance.now() - ago;
  waitingForSound = true;
}

/** Silences the answer, and tells the server how much of it was heard. `cancel` also ends its making. */
async function interrupt(cancel = true) {
  const item = response?.item ?? playing;
  if (response && cancel && !response.cancelled) {
    response.cancelled = true;
    if (response.id) connection.send({ type: "response.cancel", event_id: CUT });
  }
  waitingForSound = false;
  const unheard = item && !dropped.has(item) && (response?.item === item || player.unfinished(item));
  if (unheard) dropped.add(item);
  await player.stop();
  if (!unheard) return;
  const heard = (count.heard = player.heard(item));
  count.interruptions++;
  const cut = { type: "conversation.item.truncate", event_id: CUT, item_id: item, content_index: 0 };
  connection.send({ ...cut, audio_end_ms: heard });
  entries.get(item)?.note("interrupted", { seconds: (heard / 1000).toFixed(1) });
  showState();
}

let playing = null; // the item that plays, or played last

/** Sends what the person typed, said (Int16Array) and shows, and asks for an answer. */
async function ask({ text = "", sound = null, image = "" }) {
  await interrupt();
  await answered();
  if (connection.state !== "online") return false;
  const content = [];
  if (sound) content.push({ type: "input_audio", audio: toBase64(sound) });
  if (text) content.push({ type: "input_text", text });
  if (image) content.push({ type: "input_image", image_url: image });
  connection.send({ type: "conversation.item.create", item: { type: "message", role: "user", content } });
  new Entry("user", { text, image, spoken: sound && (1000 * sound.length) / RATE });
  requestAnswer();
  return true;
}

function requestAnswer() {
  turnEnded();
  response = { id: null, item: null, cancelled: false };
  connection.send({ type: "response.create", event_id: ASK });
  phone.caption("", true);
  showState();
}

$("composer").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if ((!text && !picture) || !online()) return;
  if (Player.possible) player.open();
  const image = picture;
  $("text").value = "";
  setPicture("");
  grow();
  if (!(await ask({ text, image }))) {
    $("text").value = text; // the connection broke meanwhile
    setPicture(image);
    online();
  }
});

$("text").addEventListener("keydown", (event) => {
  // While an input method is open, Enter picks a word.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});

function grow() {
  const box = $("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}
$("text").addEventListener("input", grow);

for (const button of $("examples").children) {
  button.addEventListener("click", () => {
    $("text").value = button.textContent;
    $("composer").requestSubmit();
    $("text").focus();
  });
}

$("stop").addEventListener("click", () => {
  interrupt();
  $("text").focus();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (talking) discardTalk();
  else interrupt();
});

player.addEventListener("started", ({ detail: { item } }) => {
  playing = item;
  if (waitingForSound && !dropped.has(item)) {
    waitingForSound = false;
    count.latency = performance.now() - turnEnd + player.delay;
    const seconds = (count.latency / 1000).toFixed(2);
    entries.get(item)?.note("firstSound", { seconds });
    $("latency").textContent = t("firstSound", { seconds });
  }
  showState();
});
player.addEventListener("idle", showState);

/** Shows or hides the stop button, and brings the call up to date. */
function showState() {
  const answering = Boolean(response) || player.playing;
  if (!answering && document.activeElement === $("stop")) $("text").focus();
  $("stop").hidden = !answering;
  phone.show();
}

// ---------------------------------------------------------------- the microphone

let talking = null; // push to talk: {since, held, chunks, live}
let closing = 0;
let silence = 0; // samples of nothing at all

const microphone = new Microphone(
  (samples, _, peak) => {
    silence = peak === 0 ? silence + samples.length : 0;
    if (silence >= SILENT_SECONDS * RATE && !muted && (talking || handsFree)) {
      silence = -Infinity; // said once
      notice("microphoneSilent", {}, { group: "device" });
      phone.problem(t("microphoneSilent"));
    }
    if (talking) {
      talking.chunks.push(samples);
      const seconds = (talking.chunks.length * samples.length) / RATE;
      $("latency").textContent = t("recordingNow", { seconds: seconds.toFixed(1) });
      if (seconds >= MOST_SPEECH) finishTalk();
    }
    if (handsFree || talking?.live) {
      const audio = toBase64(muted ? new Int16Array(samples.length) : samples);
      if (connection.sendSound(audio)) {
        sentMs += samples.length / (RATE / 1000);
        count.sent += samples.length;
      }
    }
  },
  () => {
    microphone.close();
    setHandsFree(false);
    discardTalk();
    notice("microphoneLost", {}, { group: "device" });
    phone.problem(t("microphoneLost"));
  },
);

let opening = null;

/** Opens the microphone, or says why not. */
async function openMicrophone() {
  clearTimeout(closing);
  if (microphone.stream) return true;
  notice("", {}, { group: "device" });
  silence = 0;
  try {
    await (opening ??= microphone.open());
    return true;
  } catch (error) {
    deviceNotice(error, "microphone");
    return false;
  } finally {
    opening = null;
  }
}

/** Lets the microphone go in a while, if nothing uses it then. */
function releaseMicrophone(after = KEEP_OPEN_MS) {
  clearTimeout(closing);
  closing = setTimeout(() => !talking && !handsFree && microphone.close(), after);
}

async function startTalk() {
  if (talking || handsFree || !online()) return;
  if (Player.possible) player.open();
  const turn = (talking = { since: performance.now(), held: true, chunks: [], live: !picture });
  $("talk").setAttribute("aria-pressed", "true");
  interrupt();
  if (!(await openMicrophone())) return stopTalk();
  if (talking !== turn) return; // let go while the browser asked
  if (turn.live) connection.send({ type: "input_audio_buffer.clear" });
}

function stopTalk() {
  talking = null;
  $("talk").setAttribute("aria-pressed", "false");
  $("latency").textContent = "";
  releaseMicrophone();
}

function discardTalk() {
  if (talking?.live) connection.send({ type: "input_audio_buffer.clear" });
  stopTalk();
}

async function finishTalk() {
  const { chunks, live } = talking;
  const sound = join(chunks);
  if (sound.length < LEAST_SPEECH * RATE) {
    if (microphone.stream) notice("tooShort", {}, { calm: true });
    return discardTalk();
  }
  stopTalk();
  if (!live) {
    const image = picture;
    setPicture("");
    return ask({ sound, image });
  }
  await answered();
  if (!connection.send({ type: "input_audio_buffer.commit" })) return;
  new Entry("user", { spoken: (1000 * sound.length) / RATE });
  requestAnswer();
}

// Held: as long as it is held. Pressed: until it is pressed again.
function talkDown() {
  if (talking) return finishTalk();
  startTalk();
}

function talkUp() {
  if (!talking?.held) return;
  talking.held = false;
  if (performance.now() - talking.since > HOLD_MS) finishTalk();
}

$("talk").addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  event.preventDefault();
  $("talk").focus();
  $("talk").setPointerCapture(event.pointerId);
  talkDown();
});
$("talk").addEventListener("pointerup", talkUp);
$("talk").addEventListener("pointercancel", talkUp);
$("talk").addEventListener("contextmenu", (event) => event.preventDefault());
$("talk").addEventListener("keydown", (event) => {
  if (event.key !== " " && event.key !== "Enter") return;
  event.preventDefault();
  if (!event.repeat) talkDown();
});
$("talk").addEventListener("keyup", (event) => {
  if (event.key === " " || event.key === "Enter") talkUp();
});
$("talk").addEventListener("click", (event) => {
  // Screen readers click without pointer or key.
  if (event.detail !== 0 || event.pointerType) return;
  talkDown();
  if (talking) talking.held = false;
});

/** Lets the server decide when the person is done, or not any more. Returns whether it is on. */
async function setHandsFree(on) {
  if (on && !(online() && (await openMicrophone()))) on = false;
  if (on && Player.possible) player.open();
  if (on !== handsFree) {
    handsFree = on;
    muted = false;
    if (talking) stopTalk();
    if (session) updateTurns();
    if (!on) {
      connection.send({ type: "input_audio_buffer.clear" });
      releaseMicrophone(0);
    }
  }
  $("hands-free").setAttribute("aria-pressed", String(on));
  $("talk").disabled = on;
  showState();
  return on;
}

$("hands-free").addEventListener("click", () => setHandsFree(!handsFree));

// ---------------------------------------------------------------- calls

const phone = new Phone($("phone"), {
  state() {
    if (muted) return "microphoneMuted";
    if (player.playing) return "speaking";
    return phone.heard || (response ? "thinking" : "listening");
  },
  levels: () => [muted ? 0 : microphone.level, player.level],
  mute: (on) => (muted = on),
  hungUp() {
    setHandsFree(false);
    interrupt();
    $("call").focus();
  },
});

$("call").addEventListener("click", async () => {
  if (await setHandsFree(true)) phone.open(`${connection.model} · ${voice || session.voice || t("defaultVoice")}`);
});

// ---------------------------------------------------------------- pictures

function setPicture(url) {
  picture = url;
  $("picture").hidden = !url;
  if (url) $("picture").querySelector("img").src = url;
  else $("picture").querySelector("img").removeAttribute("src");
}

async function addPicture(file) {
  if (!file) return;
  try {
    setPicture(await readPicture(file));
  } catch {
    notice("badPicture", {}, { group: "device" });
  }
  $("text").focus();
}

$("file").addEventListener("click", () => $("picture-file").click());
$("picture-file").addEventListener("change", ({ target }) => {
  addPicture(target.files[0]);
  target.value = "";
});
$("unpicture").addEventListener("click", () => {
  setPicture("");
  $("text").focus();
});
$("camera").addEventListener("click", async () => {
  try {
    const taken = await camera.open();
    if (taken) setPicture(taken);
    $("text").focus();
  } catch (error) {
    deviceNotice(error, "camera");
  }
});

const pictureIn = (items) => [...(items ?? [])].find(({ type }) => type.startsWith("image/"));
$("text").addEventListener("paste", ({ clipboardData }) => addPicture(pictureIn(clipboardData?.files)));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  addPicture(pictureIn(event.dataTransfer?.files));
});

// ---------------------------------------------------------------- voices, model, volume, language

const voices = new Voices($("voices-dialog"), {
  key: () => connection.key,
  say: (name, values) => notice(name, values, { group: "voice", calm: true }),
  changed(list, chosen) {
    const names = list.map(({ id }) => id);
    if (chosen) voice = chosen;
    if (voice && !names.includes(voice)) voice = "";
    const current = voice || session?.voice || "";
    const options = list.map(({ id, description, language }) => {
      const option = new Option(id, id, false, id === current);
      option.title = [language, description].filter(Boolean).join(", ");
      return option;
    });
    if (!names.includes(current)) options.unshift(new Option(t("defaultVoice"), "", false, true));
    $("voice").replaceChildren(...options);
    if (chosen) updateVoice();
  },
});

$("voices").addEventListener("click", () => voices.open());
$("voice").addEventListener("change", () => {
  voice = $("voice").value;
  updateVoice();
});
$("model").addEventListener("change", () => {
  connection.model = $("model").value;
  startAnew();
});
$("new").addEventListener("click", () => {
  $("log").replaceChildren();
  $("welcome").hidden = false;
  startAnew();
  $("text").focus();
});

function startAnew() {
  player.stop();
  connection.connect();
}

function setVolume() {
  const silent = $("mute").getAttribute("aria-pressed") === "true";
  player.setVolume(silent ? 0 : ($("volume").value / 100) ** 2); // loudness is felt about like its square root
  $("mute").querySelector("use").setAttribute("href", silent ? "#i-sound-off" : "#i-sound");
}
$("mute").addEventListener("click", () => {
  $("mute").setAttribute("aria-pressed", String($("mute").getAttribute("aria-pressed") !== "true"));
  setVolume();
});
$("volume").addEventListener("input", () => {
  $("mute").setAttribute("aria-pressed", "false");
  setVolume();
});

$("language").addEventListener("click", () => {
  switchLanguage();
  showConnection();
  $("latency").textContent = "";
  phone.show();
});

// ---------------------------------------------------------------- the start

for (const type of ["pointerdown", "keydown"]) {
  document.addEventListener(type, () => {
    if (!player.suspended) return;
    player.open();
    notice("", {}, { group: "tapForSound" });
  });
}

/** For tests and support: numbers to read, no content. */
Object.defineProperty(window, "minimindO", {
  value: Object.freeze({
    get connection() {
      return connection.state;
    },
    get answering() {
      return Boolean(response);
    },
    get playing() {
      return player.playing;
    },
    get samplesPlayed() {
      return player.totals.samples;
    },
    /** Root mean square of all that was played. */
    get rms() {
      return player.totals.samples ? Math.sqrt(player.totals.energy / player.totals.samples) : 0;
    },
    get samplesSent() {
      return count.sent;
    },
    get microphoneLevel() {
      return microphone.level;
    },
    get firstSoundMs() {
      return count.latency;
    },
    get interruptions() {
      return count.interruptions;
    },
    get heardMs() {
      return count.heard;
    },
    get errors() {
      return count.errors;
    },
    get voice() {
      return voice || session?.voice || "";
    },
    get handsFree() {
      return handsFree;
    },
  }),
});

showTexts();
showConnection();
readKey();
if (!Player.possible) notice("insecure", {}, { group: "device" });
connection.connect();
