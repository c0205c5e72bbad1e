// Peer is the other side of tests/interop: a server or a client that speaks mutual TLS with go-spiffe.
//
// Its identity comes from the Workload API at SPIFFE_ENDPOINT_SOCKET.
//
//	go-peer serve PEER-ID         listens on a free port of 127.0.0.1, prints its address, and answers
//	                              each request with the caller's SPIFFE ID; others than PEER-ID are refused
//	go-peer get PEER-ID URL...    requests each URL of a server that proves PEER-ID, one result a line
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

const patience = 15 * time.Second

// Result is what became of one request: either Status and Body, or Error.
type Result struct {
	Status int    `json:"status"`
	Body   string `json:"body"`
	Error  string `json:"error"`
}

func main() {
	log.SetFlags(0)
	if len(os.Args) < 3 {
		log.Fatal("usage: go-peer serve PEER-ID | go-peer get PEER-ID URL...")
	}
	peer, err := spiffeid.FromString(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer source.Close()
	if os.Args[1] == "serve" {
		err = serve(source, peer)
	} else {
		err = get(source, peer, os.Args[3:])
	}
	if err != nil {
		log.Fatal(err)
	}
}

func serve(source *workloadapi.X509Source, peer spiffeid.ID) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Printf("https://%s\n", listener.Addr())
	server := http.Server{
		Handler:           http.HandlerFunc(answer),
		TLSConfig:         tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(peer)),
		ReadHeaderTimeout: patience,
	}
	return server.ServeTLS(listener, "", "")
}

func answer(w http.ResponseWriter, r *http.Request) {
	caller, err := x509svid.IDFromCert(r.TLS.PeerCertificates[0])
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	fmt.Fprintf(w, "%s sent %d bytes", caller, len(body))
}

func get(source *workloadapi.X509Source, peer spiffeid.ID, urls []string) error {
	client := http.Client{
		Timeout: patience,
		Transport: &http.Transport{
			TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(peer)),
		},
	}
	results := json.NewEncoder(os.Stdout)
	for _, url := range urls {
		if err := results.Encode(request(&client, url)); err != nil {
			return err
		}
	}
	return nil
}

func request(client *http.Client, url string) Result {
	response, err := client.Get(url)
	if err != nil {
		return Result{Error: err.Error()}
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return Result{Error: err.Error()}
	}
	return Result{Status: response.StatusCode, Body: string(body)}
}
