// Microphone -> Opus -> the server's websocket -> text and sound. Messages begin with a byte that tells their kind.
import { OPUS_RATE, OggReader, OggWriter } from "./ogg.js";

const HANDSHAKE = 0, SOUND = 1, TEXT = 2;
const PACKET_SECONDS = 0.02;
const MARGIN_SECONDS = 0.06; // that the model's sound is held back, to play on where a packet comes late

const element = (id) => document.getElementById(id);
const tell = (status) => { element("status").textContent = status; };

// How loud samples are, for a meter: their root mean square.
const level = (samples) => Math.sqrt(samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length);

// A coder that has failed is closed already, and would throw.
const close = (coder) => { if (coder.state !== "closed") coder.close(); };

// The sound of the model, packet after packet.
class Voice {
  constructor(context) {
    this.context = context;
    this.end = 0; // when what came so far will have been played
    this.reader = new OggReader();
    this.time = 0;
    this.decoder = new AudioDecoder({ output: (data) => this.#play(data), error: (error) => tell(`Sound: ${error.message}`) });
    this.decoder.configure({ codec: "opus", sampleRate: OPUS_RATE, numberOfChannels: 1 });
  }

  hear(pages) {
    for (const data of this.reader.packets(pages)) {
      if (this.decoder.state !== "configured") return;
      this.decoder.decode(new EncodedAudioChunk({ type: "key", timestamp: this.time++, data }));
    }
  }

  #play(data) {
    const samples = new Float32Array(data.numberOfFrames);
    data.copyTo(samples, { planeIndex: 0, format: "f32-planar" });
    const buffer = this.context.createBuffer(1, samples.length, data.sampleRate);
    buffer.copyToChannel(samples, 0);
    data.close();
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.context.destination);
    if (this.end < this.context.currentTime) this.end = this.context.currentTime + MARGIN_SECONDS;
    source.start(this.end);
    this.end += buffer.duration;
    element("model").value = level(samples);
  }

  close() {
    close(this.decoder);
  }
}

// What the microphone hears, sent as pages.
class Ears {
  constructor(context, send) {
    this.writer = new OggWriter();
    this.rate = context.sampleRate;
    this.numSamples = 0;
    this.encoder = new AudioEncoder({
      output: (chunk) => {
        const packet = new Uint8Array(chunk.byteLength);
        chunk.copyTo(packet);
        send(this.writer.page(packet, PACKET_SECONDS * OPUS_RATE));
      },
      error: (error) => tell(`Microphone: ${error.message}`),
    });
    this.encoder.configure({
      codec: "opus", sampleRate: this.rate, numberOfChannels: 1, bitrate: 32000,
      opus: { frameDuration: PACKET_SECONDS * 1e6, application: "voip" },
    });
    this.writer.headers().forEach(send);
  }

  hear(samples) {
    if (this.encoder.state !== "configured") return;
    const timestamp = (this.numSamples / this.rate) * 1e6; // microseconds
    const shape = { format: "f32-planar", sampleRate: this.rate, numberOfChannels: 1, numberOfFrames: samples.length };
    this.encoder.encode(new AudioData({ ...shape, timestamp, data: samples }));
    this.numSamples += samples.length;
    element("you").value = level(samples);
  }

  close() {
    close(this.encoder);
  }
}

// Talk until `stop` is called or the server ends it.
async function talk() {
  const context = new AudioContext();
  await context.audioWorklet.addModule("microphone.js"); // first: if it fails, the microphone is not left on
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: true } });
  const microphone = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
  context.createMediaStreamSource(stream).connect(microphone);
  const voice = new Voice(context);
  let ears = null;

  const socket = new WebSocket(new URL("api/chat", location.href.replace(/^http/, "ws")));
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => {
    const [kind] = new Uint8Array(data, 0, 1), content = new Uint8Array(data, 1);
    if (kind === HANDSHAKE) {
      element("text").textContent = "";
      tell("Speak.");
      ears = new Ears(context, (page) => { if (socket.readyState === WebSocket.OPEN) socket.send(new Blob([new Uint8Array([SOUND]), page])); });
      microphone.port.onmessage = ({ data: samples }) => ears.hear(samples);
    } else if (kind === SOUND) {
      voice.hear(content);
    } else if (kind === TEXT) {
      element("text").textContent += new TextDecoder().decode(content);
    }
  };
  socket.onclose = ({ reason, wasClean }) => {
    tell(reason ? `The server left: ${reason}.` : wasClean ? "Over." : "The server cannot be reached.");
    microphone.port.onmessage = null;
    for (const part of [ears, voice, context]) part?.close();
    stream.getTracks().forEach((track) => track.stop());
    ready();
  };
  return () => socket.close();
}

function ready() {
  const button = element("talk");
  button.textContent = "Talk";
  button.onclick = async () => {
    button.onclick = null;
    try {
      const stop = await talk();
      button.textContent = "Stop";
      button.onclick = stop;
    } catch (error) {
      tell(`The microphone cannot be used: ${error.message}`);
      ready();
    }
  };
}

if (!window.AudioEncoder) tell("This browser is too old: it has no AudioEncoder (Chrome 94, Firefox 130, Safari 26).");
else if (!window.isSecureContext) tell("Browsers give the microphone to pages from this machine (127.0.0.1) or over https alone.");
else ready();
