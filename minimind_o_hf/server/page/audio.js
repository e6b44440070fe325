// Loudspeaker and microphone. Sound is PCM16, mono, 24 kHz on this side of the worklets.

export const RATE = 24000;

const url = (name) => new URL(name, import.meta.url);

let context = null;

/** The page's audio context, running once the person has touched the page. */
async function audioContext() {
  if (!context) {
    try {
      context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
    } catch {
      context = new AudioContext(); // the worklets resample
    }
  }
  // Not awaited: before the first touch of the page the promise stays open.
  if (context.state !== "running") context.resume().catch(() => {});
  return context;
}

export class Player extends EventTarget {
  /** Plays items of sound. `started` (an item), `progress` and `idle` (all was played) events hold the `item`. */
  constructor() {
    super();
    this.played = new Map(); // item -> ms that were really played
    this.received = new Map(); // item -> ms that came
    this.level = 0;
    this.playing = false;
    this.totals = { samples: 0, energy: 0 };
    this.volume = 1;
    this.stops = new Map();
    this.ready = null;
  }

  /** False where the browser gives no AudioWorklet: on pages that are not secure. */
  static get possible() {
    return window.isSecureContext && "AudioWorkletNode" in window;
  }

  /** Opens the loudspeaker. Call it in a handler of a click or key, or the browser keeps it silent. */
  open() {
    this.ready ??= this.build();
    audioContext();
    return this.ready;
  }

  async build() {
    const audio = await audioContext();
    await audio.audioWorklet.addModule(url("player-worklet.js"));
    this.node = new AudioWorkletNode(audio, "player", { numberOfInputs: 0, outputChannelCount: [1] });
    this.node.port.onmessage = ({ data }) => this.report(data);
    this.gain = new GainNode(audio, { gain: this.volume });
    this.node.connect(this.gain).connect(audio.destination);
  }

  report({ item, ms, frames, level, started, idle = false, stopped }) {
    this.totals.samples += frames;
    this.totals.energy += level * level * frames;
    if (item) this.played.set(item, Math.min(ms, this.received.get(item) ?? 0));
    if (stopped !== undefined) {
      this.silent(); // reports that were on their way may have said otherwise
      this.stops.get(stopped)?.();
      this.stops.delete(stopped);
      return;
    }
    this.level = idle ? 0 : level;
    this.playing = !idle;
    const type = started ? "started" : idle ? "idle" : "progress";
    this.dispatchEvent(new CustomEvent(type, { detail: { item } }));
  }

  /** Queues an item's next sound (Int16Array). */
  push(item, samples) {
    this.received.set(item, (this.received.get(item) ?? 0) + samples.length / (RATE / 1000));
    this.open().then(() => this.node.port.postMessage({ push: samples, item }, [samples.buffer]));
  }

  /** No more sound of the item will come. */
  end(item) {
    if (this.received.has(item)) this.open().then(() => this.node.port.postMessage({ end: item }));
  }

  /** Falls silent at once. Resolves when the counts of what was played are final. */
  async stop() {
    this.silent();
    if (!this.ready) return;
    await this.ready;
    if (context.state !== "running") return; // nothing plays, and nothing would answer
    const id = Math.random();
    const done = new Promise((resolve) => this.stops.set(id, resolve));
    this.node.port.postMessage({ stop: id });
    await done;
  }

  silent() {
    this.level = 0;
    this.playing = false;
  }

  /** Milliseconds from the worklet to the ear. */
  get delay() {
    return 1000 * (context?.outputLatency || context?.baseLatency || 0);
  }

  /** Milliseconds of an item that were heard: what the worklet gave out, less what is still on its way. */
  heard(item) {
    return Math.max(0, Math.floor((this.played.get(item) ?? 0) - this.delay));
  }

  /** Whether sound of the item came that was not played to its end. */
  unfinished(item) {
    return (this.received.get(item) ?? 0) - (this.played.get(item) ?? 0) > 1;
  }

  /** From 0 to 1. */
  setVolume(volume) {
    this.volume = volume;
    if (this.gain) this.gain.gain.setTargetAtTime(volume, context.currentTime, 0.01);
  }

  get suspended() {
    return context !== null && context.state !== "running";
  }
}

/** Why there is no microphone or camera: the name of a text, for an error of getUserMedia. */
export function deviceProblem(error, device) {
  if (!window.isSecureContext) return "insecure";
  if (!navigator.mediaDevices?.getUserMedia) return "noMediaDevices";
  if (error?.name === "NotAllowedError" || error?.name === "SecurityError") return `${device}Denied`;
  if (error?.name === "NotFoundError" || error?.name === "OverconstrainedError") return `${device}Missing`;
  if (error?.name === "NotReadableError" || error?.name === "AbortError") return `${device}Busy`;
  return `${device}Failed`;
}

export class Microphone {
  /** Gives each 40 ms of sound to `onChunk(samples, level, peak)`; `onLost()` where it is unplugged. */
  constructor(onChunk, onLost = () => {}) {
    this.onChunk = onChunk;
    this.onLost = onLost;
    this.level = 0;
  }

  /**
   * Opens it, and asks for permission where there is none yet.
   * `processed`: with the browser's removal of echo and noise, and its level; a voice is cloned better without.
   */
  async open(processed = true) {
    if (!navigator.mediaDevices?.getUserMedia) throw new Error("no mediaDevices");
    const [echoCancellation, noiseSuppression, autoGainControl] = [processed, processed, processed];
    const audio = { echoCancellation, noiseSuppression, autoGainControl, channelCount: 1 };
    this.stream = await navigator.mediaDevices.getUserMedia({ audio });
    try {
      let rate = await audioContext();
      let source;
      try {
        source = rate.createMediaStreamSource(this.stream);
      } catch {
        // Firefox: the microphone's rate is not the context's.
        rate = this.own = new AudioContext();
        source = rate.createMediaStreamSource(this.stream);
      }
      await rate.audioWorklet.addModule(url("recorder-worklet.js"));
      this.node = new AudioWorkletNode(rate, "recorder", { numberOfOutputs: 0 });
      this.node.port.onmessage = ({ data }) => {
        if (!this.stream) return;
        this.level = data.level;
        this.onChunk(data.samples, data.level, data.peak);
      };
      this.source = source;
      source.connect(this.node);
    } catch (error) {
      this.close();
      throw error;
    }
    for (const track of this.stream?.getTracks() ?? []) track.onended = () => this.onLost();
  }

  /** Lets the device go. */
  close() {
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.stream = null;
    this.level = 0;
    this.source?.disconnect();
    this.node?.port.postMessage("close");
    this.own?.close();
    this.own = this.source = this.node = null;
  }
}

/** Bytes of an Int16Array as base64. */
export function toBase64(samples) {
  const bytes = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
  let text = "";
  for (let begin = 0; begin < bytes.length; begin += 8192) {
    text += String.fromCharCode(...bytes.subarray(begin, begin + 8192));
  }
  return btoa(text);
}

/** The Int16Array that base64 text holds. */
export function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  return new Int16Array(bytes.buffer, 0, bytes.length >> 1);
}

/** Chunks of Int16Array as one. */
export function join(chunks) {
  const whole = new Int16Array(chunks.reduce((sum, chunk) => sum + chunk.length, 0));
  let offset = 0;
  for (const chunk of chunks) {
    whole.set(chunk, offset);
    offset += chunk.length;
  }
  return whole;
}

/** A WAV file of PCM16, as a Blob. */
export function wavFile(samples) {
  const header = new DataView(new ArrayBuffer(44));
  const text = (offset, value) => {
    for (let index = 0; index < value.length; index++) header.setUint8(offset + index, value.charCodeAt(index));
  };
  text(0, "RIFF");
  header.setUint32(4, 36 + samples.byteLength, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, 1, true); // mono
  header.setUint32(24, RATE, true);
  header.setUint32(28, 2 * RATE, true);
  header.setUint16(32, 2, true);
  header.setUint16(34, 16, true);
  text(36, "data");
  header.setUint32(40, samples.byteLength, true);
  return new Blob([header, samples], { type: "audio/wav" });
}
