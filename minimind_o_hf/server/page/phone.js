// The call: full screen and hands free, with a ring that shows who speaks, and captions.

import { t } from "./texts.js";

export class Phone {
  /** `state()` names the text of what goes on, `levels()` gives [microphone, loudspeaker]. */
  constructor(dialog, { state, levels, mute, hungUp }) {
    this.dialog = dialog;
    this.state = state;
    this.levels = levels;
    this.mute = mute;
    this.heard = ""; // what the server made of the microphone: "hearing", "thinking" or nothing
    this.smooth = [0, 0];
    this.find = (id) => dialog.querySelector(`#${id}`);
    this.find("hang-up").addEventListener("click", () => this.close());
    this.find("phone-mute").addEventListener("click", ({ currentTarget: button }) => this.toggleMute(button));
    this.find("phone-captions").addEventListener("click", ({ currentTarget: button }) => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      this.find("captions").hidden = !on;
    });
    dialog.addEventListener("close", () => {
      cancelAnimationFrame(this.frame);
      this.lock?.release().catch(() => {});
      this.lock = null;
      if (document.fullscreenElement) document.exitFullscreen().catch(() => {});
      hungUp();
    });
    // The screen may be locked and unlocked during a call: the wake lock is gone then.
    document.addEventListener("visibilitychange", () => this.dialog.open && this.stayAwake());
  }

  open(title) {
    this.since = performance.now();
    this.heard = "";
    this.find("phone-voice").textContent = title;
    this.caption("", true);
    this.problem("");
    this.setMute(false);
    this.dialog.showModal();
    // A phone's bars are in the way; on a desktop a window is no nuisance.
    if (matchMedia("(pointer: coarse)").matches) this.dialog.requestFullscreen?.().catch(() => {});
    this.stayAwake();
    this.show();
    this.draw();
  }

  close() {
    if (this.dialog.open) this.dialog.close();
  }

  async stayAwake() {
    try {
      this.lock = await navigator.wakeLock?.request("screen");
    } catch {
      // The battery is low, or the page is hidden.
    }
  }

  toggleMute(button) {
    this.setMute(button.getAttribute("aria-pressed") !== "true");
    this.show();
  }

  setMute(on) {
    this.mute(on);
    this.find("phone-mute").setAttribute("aria-pressed", String(on));
    this.find("phone-mute").querySelector("use").setAttribute("href", on ? "#i-mic-off" : "#i-mic");
  }

  /** Says what goes on. */
  show() {
    if (!this.dialog.open) return;
    const state = this.state();
    const text = t(state);
    this.dialog.dataset.state = state;
    if (this.find("phone-state").textContent !== text) this.find("phone-state").textContent = text;
  }

  problem(text) {
    this.find("phone-problem").textContent = text;
  }

  /** The answer so far; `fresh` begins a new one. */
  caption(text, fresh = false) {
    if (fresh && !text) return this.find("captions").classList.add("old");
    const captions = this.find("captions");
    captions.classList.remove("old");
    captions.textContent = text;
    captions.scrollTop = captions.scrollHeight;
  }

  draw() {
    const seconds = Math.floor((performance.now() - this.since) / 1000);
    const time = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    if (this.find("phone-time").textContent !== time) this.find("phone-time").textContent = time;
    this.levels().forEach((level, index) => {
      // Loudness is felt like the level's logarithm; a root is near enough. Up at once, down slowly.
      const shown = Math.min(1, Math.sqrt(level) * 1.6);
      this.smooth[index] = Math.max(shown, this.smooth[index] * 0.9);
    });
    const ring = this.dialog.querySelector(".ring");
    ring.style.setProperty("--in", this.smooth[0].toFixed(3));
    ring.style.setProperty("--out", this.smooth[1].toFixed(3));
    this.frame = requestAnimationFrame(() => this.draw());
  }
}
