// The loudspeaker's side: a queue of sound that is played without gaps, and a count of what was really played.
//
// In:  {push: Int16Array of 24 kHz, item}  {end: item}  {stop: id}
// Out: {item, ms, frames, level, started, idle, stopped}, every 40 ms while something plays, and when that changes.

import { Resampler } from "./resampler.js";

const RATE = 24000;
const REPORT_SECONDS = 0.04;
const START_SECONDS = 0.08; // held back before an answer starts: one frame of the codec
const REFILL_SECONDS = 0.3; // and after the queue has run dry, so that it does not stutter
const FADE = 0.97; // what is left after each sample of a sound that ends abruptly, so that it does not click

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(RATE, sampleRate);
    this.queue = []; // {item, samples}
    this.queued = 0; // samples in the queue
    this.offset = 0; // how far the first of them has been played
    this.ended = new Set(); // items that no more sound will come for
    this.item = null; // the one that plays, or played last
    this.frames = 0; // samples of it that were played
    this.incoming = null; // the item that the resampler's past belongs to
    this.waiting = true;
    this.reserve = START_SECONDS;
    this.last = 0;
    this.energy = 0;
    this.sinceReport = 0;
    this.port.onmessage = ({ data }) => this.receive(data);
  }

  receive(data) {
    if (data.push) {
      if (this.incoming !== data.item) {
        this.incoming = data.item;
        this.resampler.reset();
      }
      const samples = this.resampler.process(Float32Array.from(data.push, (value) => value / 32768));
      this.queue.push({ item: data.item, samples });
      this.queued += samples.length;
    } else if (data.end) {
      this.ended.add(data.end);
    } else if (data.stop !== undefined) {
      this.report({ stopped: data.stop });
      this.queue = [];
      this.queued = this.offset = 0;
      this.ended.clear();
      this.wait(START_SECONDS);
    }
  }

  wait(reserve) {
    this.waiting = true;
    this.reserve = reserve;
  }

  report(more = {}) {
    const level = this.sinceReport ? Math.sqrt(this.energy / this.sinceReport) : 0;
    const ms = (1000 * this.frames) / sampleRate;
    this.port.postMessage({ item: this.item, ms, frames: this.sinceReport, level, ...more });
    this.energy = this.sinceReport = 0;
  }

  process(_, [channels]) {
    const output = channels[0];
    if (this.waiting && this.queue.length) {
      const enough = this.queued >= this.reserve * sampleRate || this.ended.has(this.queue[0].item);
      if (enough) this.waiting = false;
    }
    for (let index = 0; index < output.length; index++) {
      output[index] = this.waiting ? this.last * FADE : this.next();
      this.last = output[index];
    }
    for (let channel = 1; channel < channels.length; channel++) channels[channel].set(output);
    if (this.sinceReport >= REPORT_SECONDS * sampleRate) this.report();
    return true;
  }

  /** One sample; the fading last one where there is none. */
  next() {
    while (this.queue.length && this.offset === this.queue[0].samples.length) {
      this.offset = 0;
      this.queue.shift();
    }
    if (!this.queue.length) {
      const done = this.ended.delete(this.item);
      this.report({ idle: done });
      this.wait(done ? START_SECONDS : REFILL_SECONDS);
      return this.last * FADE;
    }
    const { item, samples } = this.queue[0];
    if (item !== this.item) {
      this.ended.delete(this.item);
      if (this.item) this.report();
      this.item = item;
      this.frames = 0;
      this.report({ started: true });
    }
    const value = samples[this.offset++];
    this.queued--;
    this.frames++;
    this.sinceReport++;
    this.energy += value * value;
    return value;
  }
}

registerProcessor("player", Player);
