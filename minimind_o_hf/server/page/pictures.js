// Pictures: from a file or the clipboard, or of the camera, scaled down before they are sent.

const LONGEST_SIDE = 512;
const MAX_PNG = 300_000; // characters of a data URL; larger ones are sent as JPEG

/** A data URL of what can be drawn (an ImageBitmap, a video), its longest side 512 pixels at the most. */
export function shrink(source, width, height, type = "image/jpeg") {
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff"; // behind what is transparent
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(source, 0, 0, canvas.width, canvas.height);
  if (type === "image/png") {
    const url = canvas.toDataURL(type);
    if (url.length <= MAX_PNG) return url;
  }
  return canvas.toDataURL("image/jpeg", 0.9);
}

/** A data URL of a picture file. Rejects where the browser cannot read it. */
export async function readPicture(file) {
  const bitmap = await createImageBitmap(file);
  try {
    return shrink(bitmap, bitmap.width, bitmap.height, file.type);
  } finally {
    bitmap.close();
  }
}

/** The camera in its dialog: `open()` resolves with a data URL, or null where it was closed without one. */
export class Camera {
  constructor(dialog) {
    this.dialog = dialog;
    this.video = dialog.querySelector("video");
    this.facing = "environment";
    dialog.querySelector("[data-do=take]").addEventListener("click", () => this.take());
    dialog.querySelector("[data-do=turn]").addEventListener("click", () => this.turn());
    dialog.addEventListener("close", () => this.close());
  }

  /** Rejects with getUserMedia's error. */
  async open() {
    if (!navigator.mediaDevices?.getUserMedia) throw new Error("no mediaDevices");
    await this.start();
    this.picture = null;
    this.dialog.showModal();
    return new Promise((resolve) => (this.resolve = resolve));
  }

  async start() {
    const video = { facingMode: this.facing, width: { ideal: 1024 }, height: { ideal: 1024 } };
    this.stream = await navigator.mediaDevices.getUserMedia({ video });
    this.video.srcObject = this.stream;
    this.video.play().catch(() => {}); // a new source stops it
  }

  async turn() {
    this.facing = this.facing === "user" ? "environment" : "user";
    this.stop();
    try {
      await this.start();
    } catch {
      this.dialog.close();
    }
  }

  take() {
    const { videoWidth, videoHeight } = this.video;
    if (!videoWidth) return; // no frame yet
    this.picture = shrink(this.video, videoWidth, videoHeight);
    this.dialog.close();
  }

  stop() {
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.stream = this.video.srcObject = null;
  }

  close() {
    this.stop();
    this.resolve?.(this.picture);
    this.resolve = null;
  }
}
