// Command chat asks a nibble server one question and prints the answer as it comes.
//
// Make the stubs once, then ask:
//
//	GOBIN=$PWD/bin go install tool && PATH=$PWD/bin:$PATH go generate
//	go run . -server 127.0.0.1:50051 "Why is the sky blue?"
//
// A server that speaks TLS: -ca FILE, who signs its certificate. One that asks for a key: put it
// into NIBBLE_API_KEY.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "nibble.example/chat/inferencepb"
)

//go:generate protoc -I ../../proto --go_out=. --go-grpc_out=. --go_opt=module=nibble.example/chat --go-grpc_opt=module=nibble.example/chat --go_opt=Mnibble/inference/v1/inference.proto=nibble.example/chat/inferencepb --go-grpc_opt=Mnibble/inference/v1/inference.proto=nibble.example/chat/inferencepb nibble/inference/v1/inference.proto

func main() {
	server := flag.String("server", "127.0.0.1:50051", "address of the server")
	ca := flag.String("ca", "", "PEM file of who signs the server's certificate; empty: clear text")
	maxTokens := flag.Uint("max-tokens", 64, "longest answer")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: chat [-server ADDRESS] [-ca FILE] [-max-tokens N] QUESTION")
		os.Exit(2)
	}
	if err := ask(*server, *ca, flag.Arg(0), uint32(*maxTokens)); err != nil {
		failure := status.Convert(err)
		fmt.Fprintf(os.Stderr, "%s: %s\n", failure.Code(), failure.Message())
		os.Exit(1)
	}
}

func transport(ca string) (credentials.TransportCredentials, error) {
	if ca == "" {
		return insecure.NewCredentials(), nil
	}
	return credentials.NewClientTLSFromFile(ca, "")
}

func ask(server, ca, question string, maxTokens uint32) error {
	tls, err := transport(ca)
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient(server, grpc.WithTransportCredentials(tls))
	if err != nil {
		return err
	}
	defer connection.Close()

	// The deadline travels with the call; leaving the loop early would cancel it.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if key := os.Getenv("NIBBLE_API_KEY"); key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+key)
	}
	stream, err := pb.NewInferenceServiceClient(connection).ChatStream(ctx,
		&pb.ChatStreamRequest{Request: &pb.ChatRequest{
			Messages: []*pb.ChatMessage{{Role: "user", Content: question}},
			Stopping: &pb.StoppingCriteria{MaxTokens: &maxTokens},
		}})
	if err != nil {
		return err
	}
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Print(event.GetDelta().GetText())
		if finished := event.GetFinished(); finished != nil {
			usage := finished.GetUsage()
			fmt.Fprintf(os.Stderr, "\n[%d + %d tokens]\n", usage.GetPromptTokens(),
				usage.GetCompletionTokens())
		}
	}
}
