// Three things that a page cannot do by itself: follow a run as it trains, open a lineage at its checkpoint, and read a value off a curve.
"use strict";

// Ask again every two seconds; while nothing has changed the answer is one line. A hidden page does not ask.
for (const part of document.querySelectorAll("[data-live]")) {
  let mark = null;
  setInterval(async () => {
    if (document.hidden) return;
    try {
      const answer = await fetch(part.dataset.live, { headers: mark ? { "If-None-Match": mark } : {}, cache: "no-store" });
      if (answer.status !== 200) return;
      const text = await answer.text();
      if (mark !== answer.headers.get("etag")) part.innerHTML = text;
      mark = answer.headers.get("etag");
    } catch (error) {
      // The server is away: the page stays as it was and asks again.
    }
  }, 2000);
}

// A lineage opens at the checkpoint itself, wherever its box lies.
document.querySelector(".lineage .here")?.scrollIntoView({ block: "center", inline: "center" });

// The nearest point of every curve under the pointer.
document.addEventListener("pointermove", (event) => {
  const chart = event.target.closest?.(".chart");
  for (const old of document.querySelectorAll(".chart .told, .chart .dot, .chart .hair")) old.remove();
  if (!chart) return;
  const box = chart.getBoundingClientRect(), view = chart.viewBox.baseVal;
  const x = ((event.clientX - box.left) / box.width) * view.width;
  let row = 0;
  for (const line of chart.querySelectorAll(".line")) {
    const points = JSON.parse(line.dataset.points);
    const [px, py, value, height] = points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
    const draw = (name, attributes, text) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, each] of Object.entries(attributes)) made.setAttribute(key, each);
      if (text) made.textContent = text;
      chart.append(made);
    };
    const colour = [...line.classList].find((each) => /^c\d$/.test(each));
    if (!row) draw("line", { class: "hair", x1: px, x2: px, y1: 12, y2: view.height - 28 });
    draw("circle", { class: `dot ${colour}`, cx: px, cy: py, r: 4 });
    const told = `${line.dataset.name} ${Number(height.toPrecision(5))} at ${Math.round(value).toLocaleString()} ${chart.dataset.x}`;
    draw("text", { class: "told", x: px > view.width / 2 ? px - 8 : px + 8, y: 24 + 16 * row++, "text-anchor": px > view.width / 2 ? "end" : "start" }, told);
  }
});
