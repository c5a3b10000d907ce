// A turning cloud of points: the preview of a mesh that grows, and the picture of an empty stage.

export class Cloud {
  constructor(canvas) {
    this.canvas = canvas;
    this.points = [];
    this.target = [];
    this.upright = false; // whether z points up, as in the shapes preset
    this.angle = 0.6;
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.running = false;
  }

  // base64 of signed bytes x, y, z in hundredths
  show(text) {
    const bytes = Int8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    this.set(Array.from({ length: bytes.length / 3 }, (_, i) => [bytes[3 * i] / 100, bytes[3 * i + 1] / 100, bytes[3 * i + 2] / 100]));
  }

  set(points) {
    if (this.points.length !== points.length) this.points = points.map((p, i) => [...(this.points[i % Math.max(1, this.points.length)] || p)]);
    this.target = points;
    this.start();
  }

  // A sphere of points that spiral around it.
  idle() {
    const count = 520;
    this.set(Array.from({ length: count }, (_, i) => {
      const y = 1 - (2 * i + 1) / count, r = Math.sqrt(1 - y * y), a = i * 2.399963;
      return [0.62 * r * Math.cos(a), 0.62 * y, 0.62 * r * Math.sin(a)];
    }));
  }

  start() {
    if (this.running) return;
    this.running = true;
    const frame = () => {
      if (!this.running) return;
      this.draw();
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  stop() {
    this.running = false;
  }

  draw() {
    const { canvas } = this, ratio = Math.min(2, devicePixelRatio || 1);
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width || !height) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    if (!this.still.matches) this.angle += 0.006;
    const cos = Math.cos(this.angle), sin = Math.sin(this.angle), tilt = 0.32, size = 0.36 * Math.min(width, height * 0.86);
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const seen = this.points.map((point, i) => {
      for (let k = 0; k < 3; k++) point[k] += ((this.target[i] || point)[k] - point[k]) * 0.12;
      const [x, y, z] = this.upright ? [point[0], point[2], -point[1]] : point;
      const u = x * cos + z * sin, w = z * cos - x * sin;
      return [u, y * Math.cos(tilt) - w * Math.sin(tilt), w * Math.cos(tilt) + y * Math.sin(tilt)];
    }).sort((a, b) => a[2] - b[2]);
    for (const [x, y, depth] of seen) {
      const near = Math.max(0, Math.min(1, (depth + 1) / 2)), scale = 3.2 / (3.2 - depth);
      context.fillStyle = dark ? `hsl(${18 + 14 * near} 92% ${34 + 36 * near}% / ${0.35 + 0.6 * near})` : `hsl(${14 + 10 * near} ${38 + 40 * near}% ${72 - 22 * near}% / ${0.4 + 0.55 * near})`;
      context.beginPath();
      context.arc(width / 2 + size * scale * x, height * 0.42 - size * scale * y, (1.3 + 2.5 * near) * Math.max(0.75, size / 300), 0, 7);
      context.fill();
    }
  }
}
