// What the tests of all clients ask.
import { z } from "zod";

export const base = process.env.FASTSERVE_URL + "/v1";
export const model = process.env.FASTSERVE_MODEL;
export const SUM = "What is 7 + 5?";
export const TOTAL = "12";
export const WEATHER = "What is the weather in Paris?";
export const REPORT = "sunny, 21 degrees";
export const CityName = z.object({ city: z.string() });
export const City = z.object({ name: z.string().max(20), population: z.number().int().min(0).max(1000) });
