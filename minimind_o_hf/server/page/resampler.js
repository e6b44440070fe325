// Sound at another sampling rate, chunk after chunk without a seam: a windowed sinc, read from a table.

const PHASES = 256;

export class Resampler {
  /** Sampling rates in Hz. */
  constructor(from, to) {
    this.step = from / to;
    const cutoff = Math.min(1, to / from) * 0.95;
    this.half = Math.ceil(12 / cutoff);
    const width = 2 * this.half;
    this.table = new Float32Array((PHASES + 1) * width);
    for (let phase = 0; phase <= PHASES; phase++) {
      for (let tap = 0; tap < width; tap++) {
        const x = tap - this.half + 1 - phase / PHASES;
        const window = 0.5 + 0.5 * Math.cos((Math.PI * x) / this.half);
        const sinc = x === 0 ? 1 : Math.sin(Math.PI * x * cutoff) / (Math.PI * x * cutoff);
        this.table[phase * width + tap] = cutoff * sinc * (Math.abs(x) < this.half ? window : 0);
      }
    }
    this.reset();
  }

  /** Forgets what came before. */
  reset() {
    this.past = new Float32Array(this.half - 1);
    this.position = this.half - 1;
  }

  /** Samples of the new rate, as a Float32Array; about `half` samples of the old one stay for the next call. */
  process(samples) {
    if (this.step === 1) return Float32Array.from(samples);
    const { half, step, table } = this;
    const source = new Float32Array(this.past.length + samples.length);
    source.set(this.past);
    source.set(samples, this.past.length);
    const count = Math.max(0, Math.ceil((source.length - half - this.position) / step));
    const output = new Float32Array(count);
    let position = this.position;
    for (let index = 0; index < count; index++, position += step) {
      const floor = Math.floor(position);
      const row = Math.round((position - floor) * PHASES) * 2 * half;
      const begin = floor - half + 1;
      let sum = 0;
      for (let tap = 0; tap < 2 * half; tap++) sum += table[row + tap] * source[begin + tap];
      output[index] = sum;
    }
    const keep = Math.floor(position) - half + 1;
    this.past = source.slice(keep);
    this.position = position - keep;
    return output;
  }
}
