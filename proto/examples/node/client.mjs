// A client of mora-serve in Node. The stubs are made from the .proto files as they are read.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import path from "node:path";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import protobuf from "protobufjs";

import { HEALTH } from "./well_known.mjs";

const PROTO = fileURLToPath(new URL("../..", import.meta.url));
const FILES = ["adapters", "generation", "router", "server"];
const UPLOADED = ["adapter_config.json", "adapter_model.safetensors", "routing_card.json"];
const CHUNK = 256 * 1024;
// 64-bit numbers as text, for JavaScript's numbers do not hold them all; enums by their names.
const OPTIONS = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };

export const { status } = grpc;

/**
 * Calls by promises. `key` is an API key, `tls` the certificates to trust (PEM) or true for the
 * public ones; without either the connection is plain.
 */
export class Client {
  constructor(address, { proto = PROTO, tenant = "", key = "", tls = false } = {}) {
    const files = FILES.map((name) => path.join("mora_serve", "v1", `${name}.proto`));
    const own = grpc.loadPackageDefinition(
      loader.loadSync(files, { ...OPTIONS, includeDirs: [proto] }),
    ).mora_serve.v1;
    const health = grpc.loadPackageDefinition(
      loader.fromJSON(protobuf.parse(HEALTH, { keepCase: true }).root.toJSON(), OPTIONS),
    ).grpc.health.v1;
    const credentials = tls
      ? grpc.credentials.createSsl(tls === true ? null : Buffer.from(tls))
      : grpc.credentials.createInsecure();
    const channelOptions = { "grpc.max_receive_message_length": 64 << 20 };
    const stub = (Service) => new Service(address, credentials, channelOptions);
    this.generation = stub(own.GenerationService);
    this.adapters = stub(own.AdapterService);
    this.router = stub(own.RouterService);
    this.server = stub(own.ServerService);
    this.health = stub(health.Health);
    this.headers = { ...(tenant && { "mora-tenant": tenant }), ...(key && { authorization: `Bearer ${key}` }) };
  }

  close() {
    for (const stub of [this.generation, this.adapters, this.router, this.server, this.health]) {
      stub.close();
    }
  }

  metadata(extra = {}) {
    const metadata = new grpc.Metadata();
    for (const [name, value] of Object.entries({ ...this.headers, ...extra })) {
      metadata.set(name, value);
    }
    return metadata;
  }

  /** One answer for one request, e.g. `call("server", "GetServerInfo")`. */
  call(service, method, request = {}, { seconds = 60, headers = {}, onHeaders } = {}) {
    return new Promise((resolve, reject) => {
      const options = { deadline: Date.now() + 1000 * seconds };
      const call = this[service][method](request, this.metadata(headers), options, (error, response) =>
        error ? reject(error) : resolve(response),
      );
      if (onHeaders) call.on("metadata", onHeaders);
    });
  }

  /** The messages of a streamed answer: `for await (const event of client.stream(...))`. */
  stream(request, { seconds = 60 } = {}) {
    const options = { deadline: Date.now() + 1000 * seconds };
    return this.generation.GenerateStream(request, this.metadata(), options);
  }

  /** Register the files of a directory of this machine. `sha256` is for tests of what is wrong. */
  upload(name, directory, { card, replace = false, sha256, seconds = 60 } = {}) {
    const files = UPLOADED.flatMap((file) => {
      try {
        return [[file, readFileSync(path.join(directory, file))]];
      } catch (error) {
        if (error.code === "ENOENT") return [];
        throw error;
      }
    });
    const digest = createHash("sha256");
    for (const [, data] of files) digest.update(data);
    const header = { name, card, replace, sha256: sha256 ?? digest.digest("hex") };
    return new Promise((resolve, reject) => {
      const options = { deadline: Date.now() + 1000 * seconds };
      const call = this.adapters.UploadAdapter(this.metadata(), options, (error, response) =>
        error ? reject(error) : resolve(response),
      );
      const messages = function* () {
        yield { header };
        for (const [file, data] of files) {
          for (let at = 0; at < data.length; at += CHUNK) {
            yield { chunk: { file, data: data.subarray(at, at + CHUNK) } };
          }
        }
      };
      const send = async () => {
        for (const message of messages()) {
          // Wait while the connection is full, or while the call has ended.
          if (!call.write(message)) await new Promise((go) => call.once("drain", go).once("close", go));
          if (call.destroyed) return;
        }
        call.end();
      };
      send().catch(reject);
    });
  }
}
