// Passes on what the microphone hears, in the audio thread: 128 samples at a time, as they come.
registerProcessor("microphone", class extends AudioWorkletProcessor {
  process([[samples]]) {
    if (samples) this.port.postMessage(samples.slice());
    return true;
  }
});
