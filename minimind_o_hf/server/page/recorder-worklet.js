// The microphone's side: posts {samples: Int16Array of 40 ms at 24 kHz, level, peak}; in a browser that gives another
// rate, the sound is resampled here.

import { Resampler } from "./resampler.js";

const RATE = 24000;
const CHUNK = 0.04 * RATE;

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE);
    this.open = true;
    this.start();
    this.port.onmessage = () => (this.open = false);
  }

  start() {
    this.samples = new Int16Array(CHUNK);
    this.length = 0;
    this.energy = 0;
    this.peak = 0;
  }

  process([channels]) {
    if (!channels.length) return this.open;
    for (const value of this.resampler.process(channels[0])) {
      this.energy += value * value;
      this.peak = Math.max(this.peak, Math.abs(value));
      this.samples[this.length++] = Math.round(Math.max(-1, Math.min(1, value)) * 32767);
      if (this.length === CHUNK) {
        const { samples, peak } = this;
        this.port.postMessage({ samples, level: Math.sqrt(this.energy / CHUNK), peak }, [samples.buffer]);
        this.start();
      }
    }
    return this.open;
  }
}

registerProcessor("recorder", Recorder);
