/** Line drawings over the last five minutes, as SVG. Knows series of numbers, not what they mean. */

const SVG = "http://www.w3.org/2000/svg";
const SPAN = 300;
// Rows come one a second; a longer silence is a gap in the line, not a slope.
const GAP = 5;
const LEFT = 44;
const EDGE = { top: 8, right: 8, bottom: 22 };

/**
 * Draw series into a holder as wide as the holder is.
 * `rows` are arrays that begin with their time in seconds; a series is { place, name }: the row's entry and a CSS class.
 */
export function draw(holder, rows, series, label) {
  const width = Math.max(holder.clientWidth, 200);
  const height = holder.clientHeight;
  const end = rows.length ? rows[rows.length - 1][0] : 0;
  const most = niceTop(Math.max(0, ...series.flatMap(({ place }) => rows.map((row) => row[place] ?? 0))));
  const right = width - EDGE.right;
  const floor = height - EDGE.bottom;
  const x = (time) => right - ((end - time) / SPAN) * (right - LEFT);
  const y = (value) => floor - (value / most) * (floor - EDGE.top);

  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
  for (const part of height > 110 ? [0, 0.5, 1] : [0, 1]) {
    const level = y(most * part);
    svg.append(make("line", { class: "grid", x1: LEFT, x2: right, y1: level, y2: level }));
    svg.append(text(short(most * part), { x: LEFT - 6, y: level + 4, "text-anchor": "end" }));
  }
  const minutes = width < 420 ? [4, 2, 0] : [5, 4, 3, 2, 1, 0];
  for (const minute of minutes) {
    const words = minute === 0 ? "now" : `−${minute} min`;
    const anchor = minute === 0 ? "end" : minute === 5 ? "start" : "middle";
    svg.append(text(words, { x: x(end - minute * 60), y: height - 5, "text-anchor": anchor }));
  }
  const recent = rows.filter((row) => end - row[0] <= SPAN);
  for (const { place, name } of series) {
    for (const run of split(recent)) {
      const points = run.map((row) => `${x(row[0]).toFixed(1)},${y(row[place] ?? 0).toFixed(1)}`);
      const [first, last] = [x(run[0][0]).toFixed(1), x(run[run.length - 1][0]).toFixed(1)];
      svg.append(make("path", { class: `area ${name}`, d: `M${first},${floor}L${points.join("L")}L${last},${floor}Z` }));
      svg.append(make("path", { class: `line ${name}`, d: `M${points.join("L")}` }));
    }
  }
  holder.replaceChildren(svg);
}

function make(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function text(words, attributes) {
  const element = make("text", attributes);
  element.textContent = words;
  return element;
}

/** Runs of rows without a gap in time. */
function split(rows) {
  const runs = [];
  for (const row of rows) {
    const run = runs[runs.length - 1];
    if (run && row[0] - run[run.length - 1][0] <= GAP) run.push(row);
    else runs.push([row]);
  }
  return runs;
}

/** The least of 2, 4, 10, 20, 40, 100, ... that is not below the value: its half is whole too. */
function niceTop(value) {
  let top = 2;
  for (let place = 0; top < value; place += 1) top *= [2, 2.5, 2][place % 3];
  return top;
}

function short(value) {
  if (value >= 1e6) return `${value / 1e6}M`;
  return value >= 1e4 ? `${value / 1e3}k` : String(value);
}
