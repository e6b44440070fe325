// The voices: the picker's list, and the dialog that clones and deletes them.

import { Microphone, RATE, deviceProblem, join, wavFile } from "./audio.js";
import { address, headers, problemOf } from "./realtime.js";
import { t } from "./texts.js";

// The server has the last word (minimind_o_hf/recordings.py). This is what it looks at, a little stricter.
const LEAST_SECONDS = 3;
const GOOD_SECONDS = 25;
const MOST_SECONDS = 60;
const LEAST_LEVEL = 0.012; // RMS of the loud 40 ms pieces (95th percentile)
const MOST_NOISE = 0.4; // RMS of the quiet ones (20th percentile), in parts of it
const MOST_PEAK = 0.99;
const LEAST_CONSENT = 10; // characters
const PIECE = 0.04 * RATE;

/** What a recording is like so far: [name of the text, its values, whether it can be sent]. */
export function judge(levels, peak, recording = false) {
  const seconds = (levels.length * PIECE) / RATE;
  const sorted = [...levels].sort((a, b) => a - b);
  const loud = sorted[Math.floor(0.95 * (sorted.length - 1))] ?? 0;
  const quiet = sorted[Math.floor(0.2 * (sorted.length - 1))] ?? 0;
  if (peak > MOST_PEAK) return ["clipped", {}, false];
  if (seconds > 1 && peak === 0) return ["microphoneSilent", {}, false];
  if (seconds > 1.5 && loud < LEAST_LEVEL) return ["tooQuiet", {}, false];
  if (seconds > LEAST_SECONDS && quiet > MOST_NOISE * loud) return ["noisy", {}, false];
  if (seconds < LEAST_SECONDS) return ["tooShortVoice", { seconds: LEAST_SECONDS }, false];
  const more = Math.ceil(GOOD_SECONDS - seconds);
  if (more > 0 && recording) return ["moreSpeech", { seconds: more }, true];
  return ["goodRecording", {}, true];
}

export class Voices {
  /** `key()` gives the API key; `changed(voices, chosen)` gets the list, and the voice that was just made. */
  constructor(dialog, { key, changed, say }) {
    this.dialog = dialog;
    this.key = key;
    this.changed = changed;
    this.say = say;
    this.find = (id) => dialog.querySelector(`#${id}`);
    this.sample = null; // a Blob to send
    this.microphone = new Microphone(
      (...chunk) => this.hear(...chunk),
      () => this.stopRecording(),
    );
    this.find("record").addEventListener("click", () => (this.recording ? this.stopRecording() : this.record()));
    this.find("recording-file-button").addEventListener("click", () => this.find("recording-file").click());
    this.find("recording-file").addEventListener("change", ({ target }) => this.choose(target));
    this.find("accept").addEventListener("click", () => {
      this.find("consent").value = t("sentence");
    });
    this.find("clone").noValidate = true; // what is missing is said in the page's language
    this.find("clone").addEventListener("submit", (event) => {
      event.preventDefault();
      this.make();
    });
    dialog.addEventListener("close", () => this.stopRecording());
  }

  open() {
    this.problem("");
    this.dialog.showModal();
    this.load();
  }

  problem(text) {
    this.find("clone-problem").textContent = text;
  }

  request(path, options = {}) {
    return fetch(address(path), { ...options, headers: headers(this.key()) });
  }

  /** Asks the server for its voices. */
  async load(chosen) {
    let voices = [];
    try {
      const response = await this.request("v1/audio/voices");
      if (!response.ok) throw new Error(await problemOf(response));
      voices = (await response.json()).data;
    } catch (error) {
      this.problem(t("serverSays", { message: error.message }));
      return;
    }
    this.changed(voices, chosen);
    const own = voices.filter(({ source }) => source === "library");
    this.find("own").hidden = !own.length;
    this.find("own")
      .querySelector("ul")
      .replaceChildren(...own.map((voice) => this.row(voice)));
  }

  row({ id, name }) {
    const row = document.createElement("li");
    const label = document.createElement("span");
    label.textContent = name;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = t("delete");
    button.setAttribute("aria-label", t("deleteVoice", { name }));
    button.addEventListener("click", () => {
      if (button.classList.contains("danger")) return this.remove(id, name);
      button.classList.add("danger");
      button.textContent = t("reallyDelete");
      button.removeAttribute("aria-label");
    });
    row.append(label, button);
    return row;
  }

  async remove(id, name) {
    try {
      const response = await this.request(`v1/audio/voices/${encodeURIComponent(id)}`, { method: "DELETE" });
      if (!response.ok) throw new Error(await problemOf(response));
      this.say("deletedVoice", { name });
    } catch (error) {
      this.problem(t("serverSays", { message: error.message }));
    }
    await this.load();
    this.find("record").focus();
  }

  // ---------------------------------------------------------------- the recording

  async record() {
    this.forget();
    this.recording = true;
    this.chunks = [];
    try {
      await this.microphone.open(false);
    } catch (error) {
      this.recording = false;
      return this.advise([deviceProblem(error, "microphone"), {}, false]);
    }
    if (!this.dialog.open || !this.recording) return this.microphone.close(); // closed while the browser asked
    this.find("record").textContent = t("stopRecording");
    this.find("record").classList.add("danger");
  }

  forget() {
    this.sample = null;
    this.levels = [];
    this.peak = 0;
    this.problem("");
    const play = this.find("recording-play");
    if (play.src) URL.revokeObjectURL(play.src);
    play.removeAttribute("src");
    play.hidden = true;
    this.find("recording-file").value = "";
  }

  hear(samples, level, peak) {
    if (!this.recording) return;
    this.chunks.push(samples);
    this.levels.push(level);
    this.peak = Math.max(this.peak, peak);
    this.meter(level, peak);
    // Not with every piece: a screen reader would not come to an end.
    if (this.levels.length % 25 === 0) this.advise(judge(this.levels, this.peak, true));
    this.time(this.levels.length);
    if (this.levels.length * PIECE >= MOST_SECONDS * RATE) this.stopRecording();
  }

  time(pieces) {
    const seconds = Math.floor((pieces * PIECE) / RATE);
    this.find("recording-time").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  }

  meter(level, peak = 0) {
    const decibels = Math.max(0, Math.min(1, 1 + Math.log10(Math.max(level, 1e-3)) / 3 + 0.15));
    const meter = this.dialog.querySelector(".meter");
    meter.style.setProperty("--level", level ? decibels : 0);
    meter.setAttribute("aria-valuenow", level ? Math.round(100 * decibels) : 0);
    meter.classList.toggle("over", peak > MOST_PEAK);
  }

  advise([name, values, good]) {
    const advice = this.find("recording-advice");
    const text = t(name, values);
    if (advice.textContent !== text) advice.textContent = text;
    advice.classList.toggle("good", good);
  }

  stopRecording() {
    this.microphone.close();
    this.meter(0);
    if (!this.recording) return;
    this.recording = false;
    this.find("record").textContent = t("record");
    this.find("record").classList.remove("danger");
    if (this.chunks.length) this.take(wavFile(join(this.chunks)));
    this.advise(judge(this.levels, this.peak));
  }

  take(blob) {
    this.sample = blob;
    const play = this.find("recording-play");
    play.src = URL.createObjectURL(blob);
    play.hidden = false;
  }

  async choose(input) {
    const [file] = input.files;
    if (!file) return;
    this.stopRecording();
    this.forget();
    this.take(file);
    try {
      const sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
      const samples = sound.getChannelData(0);
      for (let begin = 0; begin + PIECE <= samples.length; begin += PIECE) {
        const piece = samples.subarray(begin, begin + PIECE);
        this.levels.push(Math.sqrt(piece.reduce((sum, value) => sum + value * value, 0) / PIECE));
        this.peak = piece.reduce((peak, value) => Math.max(peak, Math.abs(value)), this.peak);
      }
      this.time(this.levels.length);
      this.advise(judge(this.levels, this.peak));
    } catch {
      this.advise(["unreadRecording", {}, true]);
    }
  }

  // ---------------------------------------------------------------- the voice

  async make() {
    const consent = this.find("consent").value.trim();
    const name = this.find("voice-name").value.trim();
    const missing = (text, id) => {
      this.problem(text);
      this.find(id).focus();
    };
    if (this.recording) return missing(t("stillRecording"), "record");
    if (!this.sample) return missing(t("noRecording"), "record");
    if (consent.length < LEAST_CONSENT) return missing(t("noConsent"), "consent");
    if (!name) return missing(t("noName"), "voice-name");
    const button = this.find("make-voice");
    if (button.disabled) return;
    button.disabled = true;
    button.textContent = t("makingVoice");
    this.problem("");
    const form = new FormData();
    form.set("name", name);
    form.set("consent", consent);
    form.set("audio_sample", this.sample, this.sample.name ?? "recording.wav");
    try {
      const response = await this.request("v1/audio/voices", { method: "POST", body: form });
      if (!response.ok) throw new Error(await problemOf(response));
      const voice = await response.json();
      this.forget();
      this.find("voice-name").value = this.find("consent").value = "";
      this.find("recording-time").textContent = this.find("recording-advice").textContent = "";
      await this.load(voice.id);
      this.dialog.close();
      this.say("madeVoice", { name: voice.name });
    } catch (error) {
      this.problem(t("serverSays", { message: error.message }));
    } finally {
      button.disabled = false;
      button.textContent = t("makeVoice");
    }
  }
}
