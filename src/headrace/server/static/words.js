/** Numbers as people read them. Knows nothing of the page. */

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const TENTHS = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

/** A count or a rate: tenths below ten, whole from there on. */
export function number(value) {
  return Number.isInteger(value) || value >= 10 ? WHOLE.format(value) : TENTHS.format(value);
}

/** A share from 0 to 1 in per cent, or null where it is not known. */
export function share(value) {
  return value === null || value === undefined ? null : `${number(value * 100)} %`;
}

/** Bytes in the binary unit that leaves one to three digits before the point. */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) {
    value /= 1024;
    place += 1;
  }
  return `${place ? number(value) : WHOLE.format(value)} ${units[place]}`;
}

/** Seconds in the one or two largest units that say enough. */
export function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const minutes = Math.round(whole / 60);
  if (whole < 600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

/** "1 token", "2 tokens". */
export function count(value, noun) {
  return `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
}
