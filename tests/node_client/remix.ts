// node built/remix.js ADDRESS PROTO_FOLDER SONG OUT: submits a song, watches it, saves the remix.
import { createReadStream, createWriteStream } from "node:fs";
import { pipeline } from "node:stream/promises";

import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";

import type { Job__Output } from "./generated/remix/v1/Job";
import type { ProtoGrpcType } from "./generated/remix";

const [address, protoFolder, song, out] = process.argv.slice(2);

const definition = protoLoader.loadSync("remix/v1/remix.proto", {
  includeDirs: [protoFolder],
  longs: Number,
  enums: String,
  oneofs: true,
});
const { remix } = grpc.loadPackageDefinition(definition) as unknown as ProtoGrpcType;
const client = new remix.v1.RemixService(address, grpc.credentials.createInsecure());

function submit(): Promise<Job__Output> {
  return new Promise(async (resolve, reject) => {
    const call = client.submitRemix((error, job) => (error ? reject(error) : resolve(job!)));
    call.write({ head: { options: { seed: 7, noiseSeed: 7 } } });
    try {
      for await (const chunk of createReadStream(song)) {
        if (!call.write({ chunk })) {
          await new Promise((drained) => call.once("drain", drained));
        }
      }
      call.end();
    } catch (error) {
      reject(error);
    }
  });
}

async function* audio(jobId: string): AsyncGenerator<Buffer> {
  for await (const message of client.streamAudio({ jobId: jobId })) {
    yield message.chunk;
  }
}

const job = await submit();
const heard = pipeline(audio(job.id!), createWriteStream(out));
for await (const event of client.watchJob({ jobId: job.id })) {
  console.log(event.event === "progress" ? event.progress?.stage : event.state);
}
await heard;
client.close();
