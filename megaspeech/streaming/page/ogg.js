// Opus packets in pages of Ogg and out of them (RFC 3533, RFC 7845): browsers make packets, the server wants pages.

const HEADER_BYTES = 27;
const FIRST_PAGE = 2;
export const OPUS_RATE = 48000; // in which positions are counted, whatever the rate of the sound

const CRC = new Uint32Array(256).map((_, byte) => {
  let sum = byte << 24;
  for (let bit = 0; bit < 8; bit++) sum = (sum << 1) ^ (sum & 0x80000000 ? 0x04c11db7 : 0);
  return sum >>> 0;
});

function checksum(page) {
  let sum = 0;
  for (const byte of page) sum = ((sum << 8) ^ CRC[(sum >>> 24) ^ byte]) >>> 0;
  return sum;
}

// Pages with one packet each, at most 65,024 bytes long.
export class OggWriter {
  constructor() {
    this.serial = crypto.getRandomValues(new Uint32Array(1))[0];
    this.numPages = 0;
    this.position = 0;
  }

  // The two pages that a stream begins with.
  headers() {
    const head = new Uint8Array(19), view = new DataView(head.buffer);
    head.set(new TextEncoder().encode("OpusHead"));
    head[8] = 1; // version
    head[9] = 1; // channels
    view.setUint32(12, OPUS_RATE, true);
    const tags = new Uint8Array(16);
    tags.set(new TextEncoder().encode("OpusTags"));
    return [this.#page(head, FIRST_PAGE), this.#page(tags, 0)];
  }

  // A page with a packet of so many samples at 48 kHz.
  page(packet, numSamples) {
    this.position += numSamples;
    return this.#page(packet, 0);
  }

  #page(packet, flags) {
    const numSegments = Math.floor(packet.length / 255) + 1;
    const page = new Uint8Array(HEADER_BYTES + numSegments + packet.length), view = new DataView(page.buffer);
    page.set(new TextEncoder().encode("OggS"));
    page[5] = flags;
    view.setBigInt64(6, BigInt(this.position), true);
    view.setUint32(14, this.serial, true);
    view.setUint32(18, this.numPages++, true);
    page[26] = numSegments;
    page.fill(255, HEADER_BYTES, HEADER_BYTES + numSegments - 1);
    page[HEADER_BYTES + numSegments - 1] = packet.length % 255;
    page.set(packet, HEADER_BYTES + numSegments);
    view.setUint32(22, checksum(page), true);
    return page;
  }
}

// The packets of pages that come in pieces of any size; the two headers are left out.
export class OggReader {
  #bytes = new Uint8Array(0);
  #packet = [];
  #numHeaders = 0;

  // Packets that are complete by now.
  packets(bytes) {
    this.#bytes = joined([this.#bytes, bytes]);
    const found = [];
    for (;;) {
      const numSegments = this.#bytes[26];
      const sizes = this.#bytes.subarray(HEADER_BYTES, HEADER_BYTES + numSegments);
      const end = HEADER_BYTES + numSegments + sizes.reduce((sum, size) => sum + size, 0);
      if (this.#bytes.length < HEADER_BYTES || sizes.length < numSegments || this.#bytes.length < end) return found;
      let start = HEADER_BYTES + numSegments;
      for (const size of sizes) {
        this.#packet.push(this.#bytes.slice(start, start += size));
        if (size < 255) { // the packet's last segment
          if (this.#numHeaders < 2) this.#numHeaders++;
          else found.push(joined(this.#packet));
          this.#packet = [];
        }
      }
      this.#bytes = this.#bytes.slice(end);
    }
  }
}

function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let start = 0;
  for (const part of parts) {
    whole.set(part, start);
    start += part.length;
  }
  return whole;
}
