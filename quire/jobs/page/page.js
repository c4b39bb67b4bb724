"use strict";

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
});

for (const plot of document.querySelectorAll(".plot")) {
  const rows = plot.dataset.hover.split(";").map((row) => row.split("|"));
  const edges = rows.map((row) => Number(row[0]));
  const band = plot.querySelector(".band");
  const tip = plot.querySelector(".tip");

  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const at = (100 * (event.clientX - box.left)) / box.width;
    const found = edges.findIndex((edge) => edge >= at);
    const index = found < 0 ? edges.length - 1 : found;
    const left = index ? edges[index - 1] : 0;
    band.style.left = `${left}%`;
    band.style.width = `${edges[index] - left}%`;
    tip.replaceChildren(
      ...rows[index].slice(1).map((text) => {
        const line = document.createElement("div");
        line.textContent = text;
        return line;
      }),
    );
    plot.classList.add("on");
    const room = box.width - tip.offsetWidth;
    const wanted = ((left + edges[index]) / 200) * box.width;
    const beside = wanted + 14 <= room ? wanted + 14 : wanted - 14 - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, beside))}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => plot.classList.remove("on"));
}
